// Runs every lane of a row copy alone, for every pair of 16-byte phases, and checks that the 32 lanes write
// each byte of the row exactly once, right, and nothing outside it, with the widest word that the two
// addresses share. test_row_copy.py compiles it with -fsanitize=alignment: a misaligned word, which x86 would
// forgive and a GPU would not, ends the program.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "millrace/row_copy.h"

namespace {

constexpr int kGuard = 32;
constexpr unsigned char kUntouched = 0;

unsigned char source_byte(int i) { return static_cast<unsigned char>(1 + i % 251); }  // never kUntouched

char* at_phase(std::vector<char>& storage, int phase) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(storage.data()) % 16);
    return storage.data() + kGuard + (16 - misaligned) + phase;
}

bool check(int source_phase, int destination_phase, int bytes) {
    std::vector<char> source_storage(static_cast<std::size_t>(bytes) + 3 * kGuard);
    std::vector<char> destination_storage(static_cast<std::size_t>(bytes) + 3 * kGuard);
    char* source = at_phase(source_storage, source_phase);
    char* destination = at_phase(destination_storage, destination_phase);
    for (int i = 0; i < bytes; ++i) source[i] = static_cast<char>(source_byte(i));

    const millrace::RowSplit split = millrace::split_row(reinterpret_cast<uintptr_t>(source),
                                                         reinterpret_cast<uintptr_t>(destination), bytes);
    int widest = 16;
    while ((source_phase - destination_phase) % widest != 0) widest /= 2;
    if (split.word_bytes != widest) return false;

    std::vector<int> writes(static_cast<std::size_t>(bytes), 0);
    for (int lane = 0; lane < millrace::kLanes; ++lane) {
        std::memset(destination_storage.data(), kUntouched, destination_storage.size());
        millrace::copy_row(lane, source, destination, bytes);
        for (const char& written : destination_storage) {
            if (static_cast<unsigned char>(written) == kUntouched) continue;
            const std::ptrdiff_t i = &written - destination;
            if (i < 0 || i >= bytes) return false;
            if (static_cast<unsigned char>(written) != source_byte(static_cast<int>(i))) return false;
            ++writes[static_cast<std::size_t>(i)];
        }
    }
    for (int count : writes) {
        if (count != 1) return false;
    }
    return true;
}

}  // namespace

int main() {
    std::vector<int> sizes;
    for (int bytes = 0; bytes <= 66; ++bytes) sizes.push_back(bytes);
    for (int bytes : {511, 512, 513, 2047, 2048, 2049, 2065, 3584, 3585, 4111, 7168}) sizes.push_back(bytes);
    long cases = 0;
    for (int source_phase = 0; source_phase < 16; ++source_phase) {
        for (int destination_phase = 0; destination_phase < 16; ++destination_phase) {
            for (int bytes : sizes) {
                if (!check(source_phase, destination_phase, bytes)) {
                    std::printf("wrong: source phase %d, destination phase %d, %d bytes\n", source_phase,
                                destination_phase, bytes);
                    return 1;
                }
                ++cases;
            }
        }
    }
    std::printf("%ld cases\n", cases);
    return 0;
}
