// Preloaded into a process: a thread that Python did not start waits before it takes the GIL, and says so.
// Where it would take the GIL after the process has begun to end, it then always does, and the process aborts.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

extern void *PyGILState_GetThisThreadState(void);

int PyGILState_Ensure(void) {
    static int (*ensure)(void);
    if (!ensure) ensure = (int (*)(void))dlsym(RTLD_NEXT, "PyGILState_Ensure");
    if (!PyGILState_GetThisThreadState()) {
        static const char message[] = "A foreign thread takes the GIL.\n";
        if (write(2, message, sizeof message - 1) > 0) usleep(300000);
    }
    return ensure();
}
