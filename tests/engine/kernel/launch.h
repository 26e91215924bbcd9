// A launch of the kernel, for `emulator.py`: its blocks run one after another.

extern "C" void launch(const void* records, int count, u32* state, int* failed, int* error) {
  for (int block = 0; block < BLOCKS; block++) {
    blockIdx.x = block;
    memset(memory, 0xff, sizeof memory);  // NaN: what nothing has written
    std::vector<std::thread> threads;
    for (int i = 0; i < 288; i++) threads.emplace_back([=] { threadIdx.x = i; decode((const Record*)records, count, nullptr, state, state + 1, failed, error, LIMIT); });
    for (auto& each : threads) each.join();
  }
}
