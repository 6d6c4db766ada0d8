// Run a model file in C++ with OpenVINO: judge FOLDER IMAGE.ppm
//
// FOLDER is an unzipped model file (unzip F.blemish -d FOLDER). The image is a binary PPM of 8 bits and of the
// network's size; resize bilinearly with antialias before. The light p-value is left out.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

// Read the number, or the list of numbers, that follows a key of the manifest.
std::vector<double> numbers(const std::string& manifest, const std::string& key) {
    const auto place = manifest.find('"' + key + "\":");
    if (place == std::string::npos) throw std::runtime_error("the manifest has no " + key);
    std::vector<double> found;
    const char* at = manifest.c_str() + place + key.size() + 3;
    for (char* end;; at = end) {
        at += std::strspn(at, " \n[,");
        const double value = std::strtod(at, &end);
        if (end == at) return found;
        found.push_back(value);
    }
}

// Read a PPM into (1, 3, H, W) floats, black 0 and white 1.
ov::Tensor read_ppm(const std::string& path, size_t height, size_t width) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    size_t columns = 0, rows = 0, white = 0;
    file >> magic >> columns >> rows >> white;
    file.get();
    std::vector<char> pixels(3 * height * width);
    if (magic != "P6" || columns != width || rows != height || white != 255 ||
        !file.read(pixels.data(), pixels.size()))
        throw std::runtime_error(path + " is no PPM of " + std::to_string(width) + " x " + std::to_string(height));
    ov::Tensor images(ov::element::f32, {1, 3, height, width});
    float* to = images.data<float>();
    for (size_t i = 0; i < pixels.size(); i++)
        to[i % 3 * height * width + i / 3] = static_cast<unsigned char>(pixels[i]) / 255.0f;
    return images;
}

// Bring an image to the light of training: the mean and deviation of each channel over small blocks, but for
// the extreme hundredths.
void standardise(ov::Tensor& images, const std::string& light) {
    const auto means = numbers(light, "mean"), deviations = numbers(light, "deviation");
    const auto gains = numbers(light, "gain_limits");
    const double limit = numbers(light, "offset_limit").at(0);
    const size_t height = images.get_shape()[2], width = images.get_shape()[3];
    const size_t side = std::max<size_t>(1, std::min(height, width) / 64);
    const size_t down = height / side, across = width / side, cut = down * across / 100;
    for (size_t channel = 0; channel < 3; channel++) {
        float* plane = images.data<float>() + channel * height * width;
        std::vector<double> blocks(down * across, 0.0);
        for (size_t y = 0; y < down * side; y++)
            for (size_t x = 0; x < across * side; x++)
                blocks[y / side * across + x / side] += plane[y * width + x] / (side * side);
        std::sort(blocks.begin(), blocks.end());
        const size_t count = blocks.size() - 2 * cut;
        double mean = 0, square = 0;
        for (size_t i = cut; i < cut + count; i++) mean += blocks[i] / count;
        for (size_t i = cut; i < cut + count; i++) square += (blocks[i] - mean) * (blocks[i] - mean) / count;
        const double wanted = std::max(deviations.at(channel), 1e-4);
        const double gain = std::clamp(wanted / std::max(std::sqrt(square), 1e-4), gains.at(0), gains.at(1));
        const double offset = std::clamp(means.at(channel) - gain * mean, -limit, limit);
        for (size_t i = 0; i < height * width; i++) plane[i] = std::clamp(gain * plane[i] + offset, 0.0, 1.0);
    }
}

int main(int count, char** words) try {
    if (count != 3) throw std::runtime_error("usage: judge FOLDER IMAGE.ppm");
    const std::string folder = words[1];
    std::ifstream file(folder + "/manifest.json");
    const std::string manifest{std::istreambuf_iterator<char>(file), {}};
    const auto size = numbers(manifest, "image_size"), centers = numbers(manifest, "centers");
    const auto scales = numbers(manifest, "scales");

    // Left to itself, OpenVINO takes bfloat16 where the processor has it; the thresholds stand on float32.
    const auto exact = ov::hint::inference_precision(ov::element::f32);
    auto request = ov::Core().compile_model(folder + "/model.onnx", "CPU", exact).create_infer_request();
    auto images = read_ppm(words[2], size.at(0), size.at(1));
    if (const auto light = manifest.find("\"light\": {"); light != std::string::npos)
        standardise(images, manifest.substr(light));
    request.set_input_tensor(images);
    request.infer();

    const float* statistics = request.get_tensor("statistics").data<float>();
    double score = (statistics[0] - centers.at(0)) / scales.at(0);
    for (size_t k = 1; k < centers.size(); k++)
        score = std::max(score, (statistics[k] - centers[k]) / scales.at(k));
    const auto review = numbers(manifest, "review_threshold").at(0);
    const auto defect = numbers(manifest, "defect_threshold").at(0);
    std::printf("%s\t%.6g\t%s\n", score > defect ? "defect" : score > review ? "review" : "ok", score, words[2]);
} catch (const std::exception& error) {
    std::fprintf(stderr, "judge: %s\n", error.what());
    return 2;
}
