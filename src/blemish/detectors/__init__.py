"""The methods. Empty, so that nothing pulls in torch: `registry` lists them."""
