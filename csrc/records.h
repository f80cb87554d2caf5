// Reading RecordIO files, MXNet's .rec. The format is described in
// fastmargin/data/record_format.py; fastmargin/data/plain_records.py does the same in Python, byte
// for byte and message for message.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastmargin::records {

// What is wrong, and where: an offset into the file, or a line of an index.
struct BadRecord {
  int64_t place;
  std::string problem;
};

// Reads are at given places, so threads and forked processes may share the descriptor.
// All throw BadRecord, and std::system_error where the system cannot read.
struct File {
  int descriptor;
  int64_t size;
};

// Offsets of all records, which fill the file without a gap.
std::vector<int64_t> scan(File file);

// Payloads of the records at these offsets. Record i is expected to stop at ends[i], which need not
// be right: reads that touch are made as one.
std::vector<std::string> read(File file, const std::vector<int64_t>& offsets,
                              const std::vector<int64_t>& ends);

// The first label of image records, from their headers only.
std::vector<float> first_labels(File file, const std::vector<int64_t>& offsets);

// Keys and offsets of an .idx file.
std::pair<std::vector<int64_t>, std::vector<int64_t>> parse_index(std::string_view text);

}  // namespace fastmargin::records
