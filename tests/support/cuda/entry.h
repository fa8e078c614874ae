// What Python calls: a kernel by its name, and what it moved to and from global memory since it was last asked.
extern "C" int launch(const char *name, unsigned grid, unsigned block, unsigned long shared, unsigned seed,
                      const void *arguments) {
    const Call &call = *(const Call *)arguments;
    const Calls &calls = *(const Calls *)arguments;
#define CASE(kernel, argument) \
    if (!std::strcmp(name, #kernel)) return emulated::launch(grid, block, shared, seed, [&] { kernel(argument); });
    CASE(count, call) CASE(count_squared, call) CASE(count_update, call) CASE(compare, call) CASE(finish, calls)
    return 3;
}
extern "C" unsigned long sizes(int of_all) { return of_all ? sizeof(Calls) : sizeof(Call); }
extern "C" unsigned long long take_traffic() { return std::exchange(emulated::traffic, 0ull); }
