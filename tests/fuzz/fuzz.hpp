// The frame of a program that tests the CPU's kernels on random cases:
//
//     fuzz_NAME SECONDS SEED
//
// draws one random case per seed SEED, SEED + 1, ... A failure prints its seed; `fuzz_NAME 0 SEED` repeats only that
// case. The program defines `check`.
#pragma once

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../csrc/kernels.hpp"

// The sanitizers call abort() on an error, so that every failure prints its case.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

char current[300] = "before the first case";  // printed when a check fails

extern "C" void print_case(int) {
  std::fprintf(stderr, "\nfailed: %s\n", current);
  std::_Exit(1);
}

using Random = std::mt19937_64;

int between(Random& random, int first, int last) { return std::uniform_int_distribution<int>(first, last)(random); }

// Checks the case of a seed with every instruction set and returns its number of images.
int check(std::uint64_t seed);

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SECONDS SEED\n", argv[0]);
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  std::uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  std::signal(SIGABRT, print_case);
  std::int64_t images = 0;
  do {
    images += check(seed++);
  } while (std::chrono::steady_clock::now() < end);
  std::printf("%lld images checked, with", static_cast<long long>(images));
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) std::printf(" %s", kernels->name);
  std::printf("\n");
}
