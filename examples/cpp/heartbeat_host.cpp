// A host for heartbeat_fast bundles in C++17: conditions in, frames out, no Python.
//
//   heartbeat_host --bundle DIR --runtime libonnxruntime.so --out clip.npy
//       [--text "An ECHO with 4-chamber view."] [--ef 55] [--image F.npy] [--sketch F.npy]
//       [--mask F.npy] [--skeleton F.npy] [--flow F.npy] [--seed 0] [--sampler dpmpp_2m]
//       [--steps 10] [--temperature 0.8] [--threads 2] [--noise-out F.npy] [--texture-out F.npy]
//
// One file, read top-down: JSON, npy, numpy's random numbers, ONNX Runtime, texture noise, prompt,
// sampler, clip. docs/bundle.md says why each step is as it is. Same seed, same clip as Python's.
// It trusts its bundle: check the manifest's SHA-256 sums when you install one.
// Legend: F frames, S = H = W pixels, C channels and h w of one frame's latents.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Floats = std::vector<float>;
using Shape = std::vector<int64_t>;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// ---------------------------------------------------------------- JSON, as far as bundles use it
struct Json {
  enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
  double number = 0;  // also of a Bool
  std::string text;
  std::vector<Json> items;              // of an Array
  std::vector<std::pair<std::string, Json>> fields;  // of an Object

  bool has(const std::string& key) const {
    return std::any_of(fields.begin(), fields.end(), [&](auto& f) { return f.first == key; });
  }
  const Json& operator[](const std::string& key) const {
    for (auto& field : fields)
      if (field.first == key) return field.second;
    fail("JSON: no key " + key);
  }
  Floats floats() const {
    Floats out;
    for (auto& item : items) out.push_back(static_cast<float>(item.number));
    return out;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}
  Json read() {
    Json value = any(0);
    if (peek() != '\0') fail("JSON: something follows the end");
    return value;
  }

 private:
  char peek() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("JSON: wanted ") + wanted + " at " + std::to_string(at_));
    ++at_;
  }
  bool word(const char* wanted) {
    if (text_.compare(at_, std::strlen(wanted), wanted) != 0) return false;
    at_ += std::strlen(wanted);
    return true;
  }
  Json any(int depth) {
    if (depth > 64) fail("JSON: nested too deep");
    Json value;
    const char next = peek();
    if (next == '{' || next == '[') {
      const char close = next == '{' ? '}' : ']';
      value.kind = next == '{' ? Json::Object : Json::Array;
      ++at_;
      for (bool first = true; peek() != close; first = false) {
        if (!first) expect(',');
        if (close == ']') {
          value.items.push_back(any(depth + 1));
          continue;
        }
        peek();
        std::string key = string();
        expect(':');
        value.fields.emplace_back(std::move(key), any(depth + 1));
      }
      ++at_;
    } else if (next == '"') {
      value.kind = Json::String;
      value.text = string();
    } else if (word("true") || word("false")) {
      value.kind = Json::Bool;
      value.number = text_[at_ - 2] == 'u';
    } else if (!word("null")) {
      value.kind = Json::Number;
      const size_t end = text_.find_first_not_of("+-.0123456789eE", at_);
      const std::string digits = text_.substr(at_, end - at_);
      char* stop = nullptr;
      value.number = std::strtod(digits.c_str(), &stop);
      if (digits.empty() || *stop || !std::isfinite(value.number)) fail("JSON: bad number");
      at_ += digits.size();
    }
    return value;
  }
  std::string string() {
    expect('"');
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] != '\\') {
        out += text_[at_++];
        continue;
      }
      const char escape = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
      at_ += 2;
      static const std::string from = "nrtbf", to = "\n\r\t\b\f";
      if (escape == 'u')
        utf8(out, hex4());
      else
        out += from.find(escape) != std::string::npos ? to[from.find(escape)] : escape;
    }
    expect('"');
    return out;
  }
  uint32_t hex4() {
    const uint32_t code = std::stoul(text_.substr(at_, 4), nullptr, 16);
    at_ += 4;
    if (code < 0xD800 || code > 0xDBFF || !word("\\u")) return code;
    const uint32_t low = std::stoul(text_.substr(at_, 4), nullptr, 16);
    at_ += 4;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  static void utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const int lead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(lead[more] | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  }
  const std::string& text_;
  size_t at_ = 0;
};

Json read_json(const std::string& path) {
  const std::string text = read_file(path);
  return JsonReader(text).read();
}

// ------------------------------------------------------------------------------- .npy, both ways
struct Array {
  Shape shape;
  Floats values;
};

int64_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// float32, float64 or uint8, C order; `bytes` says whether uint8 means 0 to 255 of a picture.
Array read_npy(const std::string& path, const Shape& wanted, bool picture = false) {
  const std::string data = read_file(path);
  if (data.size() < 12 || data.compare(0, 6, "\x93NUMPY") != 0) fail(path + ": no npy file");
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<uint8_t>(data[i])); };
  const size_t start = data[6] == 1 ? 10 : 12;
  size_t length = byte(8) | byte(9) << 8;
  if (start == 12) length |= byte(10) << 16 | byte(11) << 24;
  const std::string head = data.substr(start, length);
  std::smatch shape;
  if (!std::regex_search(head, shape, std::regex(R"('shape': \(([0-9, ]*)\))")) ||
      head.find("'fortran_order': False") == std::string::npos)
    fail(path + ": wanted a C-ordered array");
  Array out;
  const std::string dims = shape[1];
  for (size_t at = 0; (at = dims.find_first_of("0123456789", at)) != std::string::npos;) {
    size_t used = 0;
    out.shape.push_back(std::stoll(dims.substr(at), &used));
    at += used;
  }
  if (out.shape != wanted) fail(path + ": wanted another shape, see docs/bundle.md");
  const bool u1 = head.find("'|u1'") != std::string::npos, f8 = head.find("'<f8'") != std::string::npos;
  if (!u1 && !f8 && head.find("'<f4'") == std::string::npos) fail(path + ": wanted f4, f8 or u1");
  const size_t width = u1 ? 1 : f8 ? 8 : 4, total = static_cast<size_t>(count(wanted));
  const size_t body = start + length;
  if (data.size() != body + total * width) fail(path + ": truncated");
  out.values.resize(total);
  for (size_t i = 0; i < total; ++i) {
    double wide = 0;
    if (u1) {
      out.values[i] = static_cast<float>(byte(body + i)) / (picture ? 255.0f : 1.0f);
    } else if (f8) {
      std::memcpy(&wide, &data[body + i * 8], 8);
      out.values[i] = static_cast<float>(wide);
    } else {
      std::memcpy(&out.values[i], &data[body + i * 4], 4);
    }
  }
  return out;
}

void write_npy(const std::string& path, const char* dtype, const Shape& shape, const void* data,
               size_t bytes) {
  std::string dims;
  for (int64_t n : shape) dims += std::to_string(n) + ", ";
  std::string head = std::string("{'descr': '") + dtype + "', 'fortran_order': False, 'shape': (" +
                     dims + "), }";
  head.append((64 - (10 + head.size() + 1) % 64) % 64, ' ');
  head += '\n';
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << "\x93NUMPY\x01" << '\0' << static_cast<char>(head.size() & 255)
       << static_cast<char>(head.size() >> 8) << head;
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) fail(path + ": not written");
}

// ------------------------------------------------- numpy.random.Generator(PCG64(seed)), bit for bit
// SeedSequence (O'Neill's seed_seq), PCG64 XSL-RR and the 256-layer ziggurat (Marsaglia & Tsang,
// J. Stat. Soft. 5(8), 2000) in single precision.
std::vector<uint32_t> seed_state(const std::vector<uint64_t>& entropy, int words) {
  std::vector<uint32_t> source;
  for (uint64_t n : entropy) {
    source.push_back(static_cast<uint32_t>(n));
    if (n >> 32) source.push_back(static_cast<uint32_t>(n >> 32));
  }
  uint32_t constant = 0x43b0d7e5;
  const auto hash = [&](uint32_t value) {
    value ^= constant;
    constant *= 0x931e8875;
    value *= constant;
    return value ^ value >> 16;
  };
  const auto mix = [](uint32_t x, uint32_t y) {
    const uint32_t out = 0xca01f9dd * x - 0x4973f715 * y;
    return out ^ out >> 16;
  };
  uint32_t pool[4];
  for (size_t i = 0; i < 4; ++i) pool[i] = hash(i < source.size() ? source[i] : 0);
  for (int from = 0; from < 4; ++from)
    for (int to = 0; to < 4; ++to)
      if (from != to) pool[to] = mix(pool[to], hash(pool[from]));
  for (size_t i = 4; i < source.size(); ++i)
    for (uint32_t& word : pool) word = mix(word, hash(source[i]));
  std::vector<uint32_t> out;
  constant = 0x8b51f9dd;
  for (int i = 0; i < words; ++i) {
    uint32_t value = pool[i % 4] ^ constant;
    constant *= 0x58f38ded;
    value *= constant;
    out.push_back(value ^ value >> 16);
  }
  return out;
}

class Random {
 public:
  explicit Random(uint64_t seed) {
    const auto w = seed_state({seed}, 8);
    const auto pair = [&](int i) { return uint64_t{w[i + 1]} << 32 | w[i]; };
    const Wide start = Wide{pair(0)} << 64 | pair(2), sequence = Wide{pair(4)} << 64 | pair(6);
    increment_ = sequence << 1 | 1;
    step();
    state_ += start;
    step();
    layers();
  }
  float uniform() { return static_cast<float>(next() >> 8) * (1.0f / 16777216.0f); }
  float normal() {
    for (;;) {
      const uint32_t r = next(), layer = r & 255, size = r >> 9;
      const float magnitude = static_cast<float>(size) * width_[layer];
      const float x = r >> 8 & 1 ? -magnitude : magnitude;
      if (size < inside_[layer]) return x;
      if (layer == 0) {
        for (;;) {
          const float xx = -1.0f / static_cast<float>(kTail) * std::log1p(-uniform());
          const float yy = -std::log1p(-uniform());
          if (yy + yy > xx * xx)
            return size >> 8 & 1 ? -(static_cast<float>(kTail) + xx) : static_cast<float>(kTail) + xx;
        }
      }
      if ((height_[layer - 1] - height_[layer]) * uniform() + height_[layer] <
          std::exp(-0.5 * x * x))
        return x;
    }
  }
  Floats normals(int64_t n) {
    Floats out(static_cast<size_t>(n));
    for (float& value : out) value = normal();
    return out;
  }

 private:
  __extension__ typedef unsigned __int128 Wide;
  static constexpr double kTail = 3.6541528853610087963519472518, kArea = 0.00492867323399;
  void step() {
    const Wide multiplier = Wide{0x2360ED051FC65DA4} << 64 | 0x4385DF649FCCF645;
    state_ = state_ * multiplier + increment_;
  }
  uint32_t next() {  // 64 bits are made at a time, the low half is handed out first
    if (half_left_) {
      half_left_ = false;
      return half_;
    }
    step();
    const uint64_t folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const int turn = static_cast<int>(state_ >> 122);
    const uint64_t out = folded >> turn | folded << (-turn & 63);
    half_ = static_cast<uint32_t>(out >> 32);
    half_left_ = true;
    return static_cast<uint32_t>(out);
  }
  void layers() {
    const double full = 8388608.0;  // 2^23, as many magnitudes as a float's fraction
    double edge = kTail, before = kTail;
    const double base = kArea / std::exp(-0.5 * edge * edge);
    inside_[0] = static_cast<uint32_t>(edge / base * full);
    inside_[1] = 0;
    width_[0] = static_cast<float>(base / full);
    width_[255] = static_cast<float>(edge / full);
    height_[0] = 1.0f;
    height_[255] = static_cast<float>(std::exp(-0.5 * edge * edge));
    for (int i = 254; i >= 1; --i) {
      edge = std::sqrt(-2.0 * std::log(kArea / edge + std::exp(-0.5 * edge * edge)));
      inside_[i + 1] = static_cast<uint32_t>(edge / before * full);
      before = edge;
      height_[i] = static_cast<float>(std::exp(-0.5 * edge * edge));
      width_[i] = static_cast<float>(edge / full);
    }
  }
  Wide state_ = 0, increment_ = 0;
  uint32_t half_ = 0, inside_[256];
  bool half_left_ = false;
  float width_[256], height_[256];
};

// ------------------------------------------------------- ONNX Runtime through its stable C interface
// OrtApi is a table of function pointers to which every release only appends; the first 101 are those
// of API version 1 and cannot move. So a host needs neither headers nor linking: with the official
// onnxruntime_c_api.h at hand, write api->CreateEnv(...) instead of call(CreateEnv, ...).
enum Slot {
  GetErrorMessage = 2,
  CreateEnv = 3,
  CreateSessionFromArray = 8,
  Run = 9,
  CreateSessionOptions = 10,
  SetIntraOpNumThreads = 24,
  CreateTensorWithDataAsOrtValue = 49,
  CreateCpuMemoryInfo = 69,
  ReleaseStatus = 93,
  ReleaseSession = 95,
  ReleaseValue = 96,
};

struct Tensor {
  Shape shape;
  Floats floats;             // float32, or empty and
  std::vector<int64_t> ids;  // int64
};
using Tensors = std::map<std::string, Tensor>;

class Runtime {
 public:
  Runtime(const std::string& library, int threads) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) fail(std::string("ONNX Runtime: ") + dlerror());
    struct Base {
      void* const* (*get_api)(uint32_t version);
      const char* (*version)();
    };
    auto base = reinterpret_cast<const Base* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (!base || !(table_ = base()->get_api(1))) fail(library + ": has no C interface, version 1");
    std::cerr << "ONNX Runtime " << base()->version() << "\n";
    call(CreateEnv, /*errors only*/ 3, "heartbeat_host", &environment_);
    call(CreateSessionOptions, &options_);
    call(SetIntraOpNumThreads, options_, threads);
    call(CreateCpuMemoryInfo, /*arena*/ 1, /*default*/ 0, &memory_);
  }
  // Calls a function that returns a status; a status other than null is an error.
  template <class... Arguments>
  void call(Slot slot, Arguments... arguments) {
    void* status = reinterpret_cast<void* (*)(Arguments...)>(table_[slot])(arguments...);
    if (!status) return;
    const std::string message = reinterpret_cast<const char* (*)(void*)>(table_[GetErrorMessage])(status);
    release(ReleaseStatus, status);
    fail("ONNX Runtime: " + message);
  }
  void release(Slot slot, void* object) { reinterpret_cast<void (*)(void*)>(table_[slot])(object); }
  void* session(const std::string& model) {
    void* out = nullptr;
    call(CreateSessionFromArray, environment_, static_cast<const void*>(model.data()), model.size(),
         static_cast<const void*>(options_), &out);
    return out;
  }
  void* wrap(Tensor& tensor) {
    const bool ids = tensor.floats.empty();
    void* data = ids ? static_cast<void*>(tensor.ids.data()) : tensor.floats.data();
    void* out = nullptr;
    call(CreateTensorWithDataAsOrtValue, static_cast<const void*>(memory_), data,
         static_cast<size_t>(count(tensor.shape)) * (ids ? 8 : 4),
         static_cast<const int64_t*>(tensor.shape.data()), tensor.shape.size(), ids ? 7 : 1, &out);
    return out;
  }

 private:
  void* const* table_ = nullptr;
  void *environment_ = nullptr, *options_ = nullptr, *memory_ = nullptr;
};

// One graph of a bundle: inputs and outputs by name, shapes from the manifest.
class Graph {
 public:
  Graph(Runtime& runtime, const std::string& folder, const Json& entry)
      : runtime_(runtime), name_(entry["file"].text), inputs_(entry["inputs"].items),
        outputs_(entry["outputs"].items) {
    const std::string model = read_file(folder + "/" + name_);
    if (static_cast<double>(model.size()) != entry["bytes"].number) fail(name_ + ": not the file it was");
    session_ = runtime.session(model);
  }
  ~Graph() { runtime_.release(ReleaseSession, session_); }
  Graph(const Graph&) = delete;

  static Shape shape(const Json& tensor) {
    Shape out;
    for (auto& n : tensor["shape"].items) out.push_back(static_cast<int64_t>(n.number));
    return out;
  }
  Tensors run(Tensors& known) {
    Tensors made;
    std::vector<const char*> names[2];
    std::vector<void*> values[2];
    for (auto& input : inputs_) {
      const std::string& name = input["name"].text;
      auto found = known.find(name);
      if (found == known.end()) fail(name_ + ": nothing made its input " + name);
      if (found->second.shape != shape(input)) fail(name_ + ": another shape wanted of " + name);
      names[0].push_back(name.c_str());
      values[0].push_back(runtime_.wrap(found->second));
    }
    for (auto& output : outputs_) {
      Tensor& tensor = made[output["name"].text];
      tensor.shape = shape(output);
      tensor.floats.resize(static_cast<size_t>(count(tensor.shape)));
      names[1].push_back(output["name"].text.c_str());
      values[1].push_back(runtime_.wrap(tensor));  // ONNX Runtime writes straight into it
    }
    runtime_.call(Run, session_, static_cast<const void*>(nullptr),
                  static_cast<const char* const*>(names[0].data()), values[0].data(),
                  values[0].size(), static_cast<const char* const*>(names[1].data()),
                  names[1].size(), values[1].data());
    for (auto& list : values)
      for (void* value : list) runtime_.release(ReleaseValue, value);
    return made;
  }

 private:
  Runtime& runtime_;
  const std::string name_;
  const std::vector<Json> inputs_, outputs_;
  void* session_ = nullptr;
};

// --------------------------------------------------- texture noise, carried by scatterers on the flow
// Sums over the 5x5 neighbours of every pixel, edges repeated.
std::vector<int64_t> box5(const std::vector<int64_t>& image, int size) {
  std::vector<int64_t> rows(image.size()), out(image.size());
  const auto edge = [size](int i) { return std::clamp(i, 0, size - 1); };
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x)
      for (int d = -2; d <= 2; ++d) rows[y * size + x] += image[edge(y + d) * size + x];
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x)
      for (int d = -2; d <= 2; ++d) out[y * size + x] += rows[y * size + edge(x + d)];
  return out;
}

Floats texture(const Floats& flow, int frames, int size, uint64_t seed) {
  Random random(seed);
  const size_t pixels = static_cast<size_t>(size) * size;
  // One scatterer anywhere in each cell of a lattice.
  Floats x(pixels), y(pixels);
  const float side = static_cast<float>((size - 1.0) / size);
  for (size_t i = 0; i < pixels; ++i) x[i] = (random.uniform() + static_cast<float>(i % size)) * side;
  for (size_t i = 0; i < pixels; ++i) y[i] = (random.uniform() + static_cast<float>(i / size)) * side;
  const Floats real = random.normals(pixels), imaginary = random.normals(pixels);
  Floats out(static_cast<size_t>(frames) * 2 * pixels);
  for (int t = 0; t < frames; ++t) {
    float* frame = &out[static_cast<size_t>(t) * 2 * pixels];
    if (t > 0 && flow.empty()) {  // nothing moves
      std::copy_n(out.begin(), 2 * pixels, frame);
      continue;
    }
    // Whole numbers, as in Python: positions to 1/16 pixel, amplitudes to 1/4096, so bilinear weights
    // are exact in 1/256 and the sums do not depend on their order.
    std::vector<int64_t> sums[3];  // real, imaginary, weight
    for (auto& sum : sums) sum.assign(pixels, 0);
    const auto sixteenths = [size](float at) {
      return static_cast<int>(std::nearbyint(std::clamp(at, -1.0f, static_cast<float>(size)) * 16));
    };
    const int most = (size - 1) * 16;
    for (size_t i = 0; i < pixels; ++i) {
      const int column = sixteenths(x[i]), row = sixteenths(y[i]);
      if (column < 0 || row < 0 || column >= most || row >= most) continue;
      const int fx = column & 15, fy = row & 15;
      const int weight[4] = {(16 - fx) * (16 - fy), fx * (16 - fy), (16 - fx) * fy, fx * fy};
      const size_t cell = static_cast<size_t>(row >> 4) * size + (column >> 4);
      const size_t corner[4] = {cell, cell + 1, cell + size, cell + size + 1};
      const auto whole = [](float a) { return static_cast<int64_t>(std::nearbyint(a * 4096)); };
      const int64_t parts[3] = {whole(real[i]), whole(imaginary[i]), 1};
      for (int k = 0; k < 4; ++k)
        for (int part = 0; part < 3; ++part) sums[part][corner[k]] += weight[k] * parts[part];
    }
    const std::vector<int64_t> crowd = box5(sums[2], size);
    for (size_t i = 0; i < pixels; ++i) {
      const float variance = static_cast<float>(crowd[i]) * static_cast<float>(4.0 / 9 / 25 / 256);
      const float scale = 1.0f / (256 * 4096) / std::sqrt(std::max(variance, 0.05f));
      frame[i] = static_cast<float>(sums[0][i]) * scale;
      frame[pixels + i] = static_cast<float>(sums[1][i]) * scale;
    }
    if (t + 1 == frames || flow.empty()) continue;
    const float* motion = &flow[static_cast<size_t>(t) * 2 * pixels];
    const auto nearest = [size](float place) {  // ties go to the even pixel, as in numpy
      return static_cast<size_t>(std::clamp(static_cast<int>(std::nearbyint(place)), 0, size - 1));
    };
    for (size_t i = 0; i < pixels; ++i) {
      const size_t here = nearest(y[i]) * size + nearest(x[i]);
      x[i] += motion[here];
      y[i] += motion[pixels + here];
    }
  }
  return out;
}

// ------------------------------------------------------------- prompt to tokens: byte-level BPE, ASCII
std::vector<int64_t> tokens(const std::string& prompt, const Json& file, size_t length) {
  if (file["pre_tokenizer"]["type"].text != "ByteLevel") fail("tokenizer: only ByteLevel is known here");
  std::string text;
  for (char c : prompt) {
    if (static_cast<unsigned char>(c) > 126) fail("text: only ASCII is known here");
    if (!std::isspace(static_cast<unsigned char>(c)))
      text += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    else if (!text.empty() && text.back() != ' ')
      text += ' ';
  }
  if (!text.empty() && text.back() == ' ') text.pop_back();
  if (!text.empty() && file["pre_tokenizer"]["add_prefix_space"].number != 0) text = " " + text;
  std::map<std::string, int64_t> vocabulary, special;
  for (auto& [word, id] : file["model"]["vocab"].fields) vocabulary[word] = static_cast<int64_t>(id.number);
  for (auto& token : file["added_tokens"].items)
    special[token["content"].text] = static_cast<int64_t>(token["id"].number);
  std::map<std::pair<std::string, std::string>, size_t> ranks;
  for (auto& merge : file["model"]["merges"].items) {
    const size_t space = merge.text.find(' ');
    const bool joined = merge.kind == Json::String;  // "a b" in older files, ["a", "b"] in newer
    ranks.emplace(joined ? std::pair(merge.text.substr(0, space), merge.text.substr(space + 1))
                         : std::pair(merge.items[0].text, merge.items[1].text), ranks.size());
  }
  std::vector<int64_t> ids = {special.at("<|startoftext|>")};
  const std::regex words("'s|'t|'re|'ve|'m|'ll|'d| ?[a-z]+| ?[0-9]+| ?[^ a-z0-9]+| +");
  for (std::sregex_iterator it(text.begin(), text.end(), words), end; it != end; ++it) {
    std::vector<std::string> parts;
    for (char c : it->str()) parts.push_back(c == ' ' ? "\u0120" : std::string(1, c));
    for (;;) {
      size_t best = ranks.size(), where = 0;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto rank = ranks.find({parts[i], parts[i + 1]});
        if (rank != ranks.end() && rank->second < best) best = rank->second, where = i;
      }
      if (best == ranks.size()) break;
      parts[where] += parts[where + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
    }
    for (auto& part : parts) ids.push_back(vocabulary.at(part));
  }
  const int64_t stop = special.at("<|endoftext|>");
  ids.push_back(stop);
  if (ids.size() > length) fail("text: longer than " + std::to_string(length) + " tokens");
  const Json padding = file.has("padding") ? file["padding"] : Json{};
  ids.resize(length, padding.has("pad_id") ? static_cast<int64_t>(padding["pad_id"].number) : stop);
  return ids;
}

// ------------------------------------------------------------------------------- the sampler's table
const Json& pick_table(const Json& samplers, std::string name, int steps) {
  const Json* found = nullptr;
  for (auto& table : samplers["tables"].items) {
    const int has = static_cast<int>(table["steps"].number);
    if (name.empty()) name = table["name"].text;  // dpmpp_2m in a full bundle, few_step in a small one
    if (table["name"].text != name || (steps && has != steps)) continue;
    if (!found || (has == 10 && !steps) || (has > (*found)["steps"].number && (*found)["steps"].number != 10))
      found = &table;
  }
  if (!found) fail("sampler: the bundle has none of this name and number of steps");
  return *found;
}

Floats weighted(const std::vector<float>& row, const std::vector<const Floats*>& arrays) {
  Floats out;
  for (size_t k = 0; k < row.size() && k < arrays.size(); ++k) {
    if (row[k] == 0) continue;
    const bool first = out.empty();
    out.resize(arrays[k]->size());
    for (size_t i = 0; i < out.size(); ++i) {
      const float term = (*arrays[k])[i] * row[k];
      out[i] = first ? term : out[i] + term;
    }
  }
  return out;
}

// x_{i+1} is a weighted sum: of the last pairs (x_i, h_{i+1}, x_{i-1}, …) in the multistep form, else
// of the noise and all outputs (h_0 … h_{i+1}).
Floats sample(const Json& table, const Floats& noise,
              const std::function<Floats(const Floats&, float time)>& denoise) {
  const bool dense = table["multistep"].kind == Json::Null;
  const auto& rows = table[dense ? "weights" : "multistep"].items;
  const Floats scales = table["input_scale"].floats(), times = table["timesteps"].floats();
  const auto scaled = [](Floats values, float by) {
    for (float& value : values) value *= by;
    return values;
  };
  std::vector<Floats> history = {noise};  // oldest first: h_0 h_1 …, or x_0 h_1 x_1 h_2 …
  Floats x = scaled(noise, static_cast<float>(table["init_sigma"].number));
  if (!dense) history.clear();
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!dense) history.push_back(x);
    history.push_back(denoise(scaled(x, scales[i]), times[i]));
    std::vector<const Floats*> arrays;
    if (dense)
      for (auto& one : history) arrays.push_back(&one);
    else
      for (size_t at = history.size(); at >= 2; at -= 2)
        arrays.insert(arrays.end(), {&history[at - 2], &history[at - 1]});
    x = weighted(rows[i].floats(), arrays);
  }
  return x;
}

// ---------------------------------------------------------------------------------------- the clip
using Options = std::map<std::string, std::string>;

// Everything but the text as the graphs take it: batch 1, zeros where a condition is absent.
Tensors conditions(const Options& given, const Json& manifest) {
  const int64_t F = static_cast<int64_t>(manifest["frames"].number);
  const int64_t S = static_cast<int64_t>(manifest["size"].number), pixels = S * S;
  Tensors out;
  for (auto& [name, shape] : std::map<std::string, Shape>{{"ef", {1, 1}}, {"present", {1, 7}},
           {"image", {1, 3, S, S}}, {"sketch", {1, 1, S, S}}, {"mask", {1, F, 4, S, S}},
           {"skeleton", {1, F, 1, S, S}}, {"flow", {1, F, 2, S, S}}})
    out[name] = {shape, Floats(static_cast<size_t>(count(shape))), {}};
  const char* order[] = {"text", "ef", "image", "sketch", "mask", "skeleton", "flow"};
  for (int i = 0; i < 7; ++i)
    if (given.count(order[i]) && !given.at(order[i]).empty()) out["present"].floats[i] = 1;
  const auto present = [&](const char* name) { return given.count(name) && !given.at(name).empty(); };
  if (present("ef")) out["ef"].floats[0] = static_cast<float>(std::stod(given.at("ef")) / 100);
  if (present("image")) {
    const Floats grey = read_npy(given.at("image"), {S, S}, true).values;
    for (int c = 0; c < 3; ++c) std::copy(grey.begin(), grey.end(), &out["image"].floats[c * pixels]);
  }
  if (present("sketch")) out["sketch"].floats = read_npy(given.at("sketch"), {S, S}).values;
  if (present("skeleton")) out["skeleton"].floats = read_npy(given.at("skeleton"), {F, S, S}).values;
  if (present("flow")) {
    Floats& flow = out["flow"].floats = read_npy(given.at("flow"), {F, 2, S, S}).values;
    std::fill(flow.end() - 2 * pixels, flow.end(), 0.0f);  // the last frame has no next one
  }
  if (present("mask")) {
    const Floats labels = read_npy(given.at("mask"), {F, S, S}).values;
    for (int64_t i = 0; i < F * pixels; ++i) {
      if (labels[i] < 0 || labels[i] > 3) fail("mask: wanted labels 0 to 3");
      out["mask"].floats[(i / pixels * 4 + static_cast<int>(labels[i])) * pixels + i % pixels] = 1;
    }
  }
  return out;
}

// Unit noise, part of its power common to all frames.
Floats initial_noise(const Shape& shape, double shared, uint64_t seed) {
  Random random(seed);
  const size_t all = static_cast<size_t>(count(shape)), frame = all / static_cast<size_t>(shape[1]);
  Floats common = random.normals(static_cast<int64_t>(frame)), noise(all);
  const float of_common = std::sqrt(static_cast<float>(shared));
  const float of_own = std::sqrt(1 - static_cast<float>(shared));
  const Floats own = shared == 1 ? noise : random.normals(static_cast<int64_t>(all));
  for (size_t i = 0; i < all; ++i) noise[i] = of_common * common[i % frame] + of_own * own[i];
  return noise;
}

void write_clip(const Options& option) {
  const std::string folder = option.at("bundle");
  const Json manifest = read_json(folder + "/manifest.json");
  if (manifest["schema_version"].number != 1) fail("manifest: another schema version");
  const auto path = [&](const char* key) { return folder + "/" + manifest["files"][key]["file"].text; };
  const Json samplers = read_json(path("samplers"));
  const Json& table = pick_table(samplers, option.at("sampler"), std::stoi(option.at("steps")));
  const uint64_t seed = std::stoull(option.at("seed"));
  const float temperature = std::stof(option.at("temperature"));

  Runtime runtime(option.at("runtime"), std::stoi(option.at("threads")));
  std::map<std::string, std::unique_ptr<Graph>> graphs;
  for (const char* name : {"text", "image", "local", "context", "time", "denoise", "decode"})
    graphs[name] = std::make_unique<Graph>(runtime, folder, manifest["graphs"][name]);

  // Once per clip: conditions to K and V of every cross-attention, and the local features' share.
  Tensors known = conditions(option, manifest);
  known["tokens"] = {{1, 77}, {}, tokens(option.at("text"), read_json(path("tokenizer")), 77)};
  for (const char* name : {"text", "image", "local", "context"}) known.merge(graphs[name]->run(known));

  // Once per step: the time embedding (of a host that stays warm: once per sampler) and the denoiser.
  const Shape z = Graph::shape(manifest["graphs"]["denoise"]["inputs"].items[0]);
  Floats noise = initial_noise(z, manifest["shared_start"].number, seed);
  if (!option.at("noise-out").empty())
    write_npy(option.at("noise-out"), "<f4", z, noise.data(), noise.size() * 4);
  for (float& value : noise) value = temperature * value;
  const Floats latents = sample(table, noise, [&](const Floats& x, float time) {
    known["t"] = {{1}, {time}, {}};
    known["z"] = {z, x, {}};
    known["temb"] = graphs["time"]->run(known).at("temb");
    return graphs["denoise"]->run(known).at("out").floats;
  });

  // Once per clip: texture noise from a stream of its own, and the decoder.
  const int F = static_cast<int>(manifest["frames"].number), S = static_cast<int>(manifest["size"].number);
  const bool moves = !option.at("flow").empty();
  const Floats grain =
      texture(moves ? known["flow"].floats : Floats{}, F, S, seed_state({seed, 1}, 1)[0]);
  if (!option.at("texture-out").empty())
    write_npy(option.at("texture-out"), "<f4", {F, 2, S, S}, grain.data(), grain.size() * 4);
  known["z"] = {z, latents, {}};
  known["noise"] = {{1, F, 2, S, S}, grain, {}};
  const Tensors decoded = graphs["decode"]->run(known);
  std::vector<uint8_t> frames;
  for (float value : decoded.at("frames").floats) {
    if (!std::isfinite(value)) fail("frames came out as NaN");
    frames.push_back(static_cast<uint8_t>(std::clamp(value, 0.0f, 1.0f) * 255 + 0.5f));
  }
  write_npy(option.at("out"), "|u1", {F, S, S}, frames.data(), frames.size());
  std::cerr << option.at("out") << ": " << F << " synthetic frames of " << S << " x " << S << "\n";
}

int main(int argc, char** argv) {
  Options option{{"bundle", ""}, {"runtime", ""}, {"out", ""}, {"text", ""}, {"ef", ""}, {"image", ""},
                 {"sketch", ""}, {"mask", ""}, {"skeleton", ""}, {"flow", ""}, {"seed", "0"},
                 {"sampler", ""}, {"steps", "0"}, {"temperature", "0.8"}, {"threads", "2"},
                 {"noise-out", ""}, {"texture-out", ""}};
  try {
    for (int i = 1; i < argc; i += 2) {
      const std::string name = argv[i];
      if (name.rfind("--", 0) != 0 || !option.count(name.substr(2)) || i + 1 == argc)
        fail("option " + name + ": unknown, or without its value; the head of the source lists them");
      option[name.substr(2)] = argv[i + 1];
    }
    for (const char* name : {"bundle", "runtime", "out"})
      if (option[name].empty()) fail(std::string("option --") + name + " is missing");
    write_clip(option);
  } catch (const std::exception& error) {
    std::cerr << "heartbeat_host: error: " << error.what() << "\n";
    return 2;
  }
}
