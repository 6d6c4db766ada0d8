"""Write format2.blemish and its verdicts on rendered parts: run once, when a format is released.

    PYTHONPATH=tests python tests/files/make_format2.py

See make_format1.py. Files of format 2 require that their reader knows more than the first version did: this
one, that light is standardised.
"""

from make_format1 import make

if __name__ == "__main__":
    make("format2", light="standardise")
