/* The two programs of critest's images that no package has: pause waits for a signal to end,
 * euid tells who it runs as. One source, two programs: -DPAUSE. */
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#ifdef PAUSE
int main(void)
{
    sigset_t set;
    int signal;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return sigwait(&set, &signal);
}
#else
int main(void)
{
    return printf("Effective uid: %d\n", (int)geteuid()) < 0;
}
#endif
