#include "records.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>

static_assert(std::endian::native == std::endian::little, "records are read as they lie");

namespace fastmargin::records {
namespace {

constexpr uint32_t kMagic = 0xced7230a;
constexpr int64_t kPartHeader = 8;   // magic; kind in 3 bits and length in 29
constexpr size_t kImageHeader = 24;  // flag, label, two ids
constexpr int64_t kChunk = 1 << 20;  // most that is read ahead
enum Kind : uint32_t { kWhole, kFirst, kMiddle, kLast };

// A stretch of the file in memory.
class Window {
 public:
  explicit Window(File file) : file_(file) {}

  // `count` bytes at `offset`, all inside the file. If they are not here yet, `ahead` are read.
  const char* at(int64_t offset, int64_t count, int64_t ahead) {
    if (offset < start_ || offset + count > start_ + filled_) {
      fill(offset, std::min(std::max(count, ahead), file_.size - offset));
    }
    return bytes_.data() + (offset - start_);
  }

  int64_t file_size() const { return file_.size; }

  int64_t record = 0;  // what errors are about

 private:
  void fill(int64_t offset, int64_t count) {
    if (static_cast<int64_t>(bytes_.size()) < count) bytes_.resize(count);
    start_ = offset;
    filled_ = 0;
    while (filled_ < count) {
      const ssize_t got =
          pread(file_.descriptor, bytes_.data() + filled_, count - filled_, offset + filled_);
      if (got == 0) throw BadRecord{record, "the file became shorter while it was read"};
      if (got > 0) {
        filled_ += got;
      } else if (errno != EINTR) {
        throw std::system_error(errno, std::generic_category());
      }
    }
  }

  File file_;
  int64_t start_ = 0, filled_ = 0;
  std::vector<char> bytes_;
};

// Calls visit(offset, length) for the parts of the record that starts at `start`, until it returns
// false. Returns where the last part seen ends.
template <typename Visit>
int64_t walk(Window& window, int64_t start, int64_t ahead, Visit visit) {
  window.record = start;
  const int64_t size = window.file_size();
  const auto bad = [start](const std::string& problem) { return BadRecord{start, problem}; };
  const auto cut_off = [&] {
    return bad("the file ends at byte " + std::to_string(size) + ", inside this record");
  };
  if (start < 0 || start >= size) {
    throw bad("outside the file of " + std::to_string(size) + " bytes");
  }
  if (start % 4 != 0) throw bad("records start at multiples of 4");
  for (int64_t at = start;;) {
    if (at + kPartHeader > size) throw cut_off();
    uint32_t head[2];
    std::memcpy(head, window.at(at, kPartHeader, ahead), kPartHeader);
    const uint32_t kind = head[1] >> 29, length = head[1] & 0x1fffffff;
    if (head[0] != kMagic) {
      char found[16];
      std::snprintf(found, sizeof found, "0x%08x", static_cast<unsigned>(head[0]));
      throw bad(std::string("no record here: ") + found + " instead of 0xced7230a");
    }
    if (kind > kLast) throw bad("unknown kind of part " + std::to_string(kind));
    if ((at == start) != (kind == kWhole || kind == kFirst)) {
      throw bad(at == start ? "a later part of a record, not its start"
                            : "breaks off: another record starts before its last part");
    }
    const int64_t end = at + kPartHeader + (int64_t{length} + 3) / 4 * 4;
    if (end > size) throw cut_off();
    if (!visit(at + kPartHeader, int64_t{length}) || kind == kWhole || kind == kLast) return end;
    at = end;
  }
}

// The first `count` bytes of the payload, or all if it is shorter.
void take(Window& window, int64_t start, int64_t ahead, size_t count, std::string& payload) {
  payload.clear();
  walk(window, start, ahead, [&](int64_t offset, int64_t length) {
    if (offset != start + kPartHeader) {  // this magic number was cut out between parts
      payload.append(reinterpret_cast<const char*>(&kMagic), sizeof kMagic);
    }
    const int64_t wanted = std::min<uint64_t>(length, count - std::min(count, payload.size()));
    payload.append(window.at(offset, wanted, ahead), wanted);
    return payload.size() < count;
  });
}

// So that a disk works on a whole batch at once, not on what is read first.
void will_need(File file, int64_t start, int64_t stop) {
#ifdef POSIX_FADV_WILLNEED
  if (start < stop) {
    posix_fadvise(file.descriptor, start, std::min(stop - start, kChunk), POSIX_FADV_WILLNEED);
  }
#endif
}

}  // namespace

std::vector<int64_t> scan(File file) {
  Window window(file);
  std::vector<int64_t> offsets;
  for (int64_t at = 0; at < file.size;) {
    offsets.push_back(at);
    at = walk(window, at, kChunk, [](int64_t, int64_t) { return true; });
  }
  return offsets;
}

std::vector<std::string> read(File file, const std::vector<int64_t>& offsets,
                              const std::vector<int64_t>& ends) {
  if (offsets.size() != ends.size()) throw std::invalid_argument("an end for every offset");
  const size_t count = offsets.size();
  std::vector<int64_t> stops(count);  // of the run of neighbours that each is in
  for (size_t i = 0, next; i < count; i = next) {
    stops[i] = ends[i];
    for (next = i + 1; next < count && offsets[next] == stops[i]; ++next) {
      if (ends[next] - offsets[i] > kChunk) break;
      stops[i] = ends[next];
    }
    std::fill(stops.begin() + i, stops.begin() + next, stops[i]);
    if (next - i < count) will_need(file, offsets[i], stops[i]);
  }
  Window window(file);
  std::vector<std::string> payloads(count);
  for (size_t i = 0; i < count; ++i) {
    take(window, offsets[i], std::min(stops[i] - offsets[i], kChunk), std::string::npos,
         payloads[i]);
  }
  return payloads;
}

std::vector<float> first_labels(File file, const std::vector<int64_t>& offsets) {
  Window window(file);
  std::vector<float> labels;
  labels.reserve(offsets.size());
  std::string head;
  for (const int64_t offset : offsets) {
    constexpr int64_t wanted = kImageHeader + sizeof(float);
    take(window, offset, kPartHeader + wanted, wanted, head);
    uint32_t flag = 0;
    if (head.size() >= kImageHeader) std::memcpy(&flag, head.data(), sizeof flag);
    const size_t needed = kImageHeader + (flag ? sizeof(float) : 0);
    if (head.size() < needed) {
      throw BadRecord{offset, "has " + std::to_string(head.size()) + " bytes, the header " +
                                  std::to_string(needed) + ": not an image record"};
    }
    float label;
    std::memcpy(&label, head.data() + (flag ? kImageHeader : sizeof flag), sizeof label);
    labels.push_back(label);
  }
  return labels;
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> parse_index(std::string_view text) {
  std::pair<std::vector<int64_t>, std::vector<int64_t>> found;
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  for (int64_t line = 1; !text.empty(); ++line) {
    const size_t length = std::min(text.find('\n'), text.size());
    const char *at = text.data(), *const end = at + length;
    const auto skip_blanks = [&] {
      const char* const before = at;
      at = std::find_if_not(at, end, blank);
      return at != before || at == end;
    };
    skip_blanks();
    if (at != end) {
      int64_t number[2];
      for (int64_t& n : number) {
        const auto [stop, error] = std::from_chars(at, end, n);
        at = stop;
        if (error != std::errc() || !skip_blanks()) throw BadRecord{line, "expected two integers"};
      }
      if (at != end) throw BadRecord{line, "expected two integers"};
      found.first.push_back(number[0]);
      found.second.push_back(number[1]);
    }
    text.remove_prefix(std::min(length + 1, text.size()));
  }
  return found;
}

}  // namespace fastmargin::records
