/* Preloaded: TCP sockets become sockets of Multipath TCP, which goes on over another link when one dies.
 * Built by trainer/launch/transport.py. Where the peer knows no MPTCP, the kernel falls back to plain TCP. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

int socket(int domain, int type, int protocol) {
    int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    int stream = (type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)) == SOCK_STREAM;
    if ((domain == AF_INET || domain == AF_INET6) && stream && (protocol == 0 || protocol == IPPROTO_TCP)) {
        int made = real(domain, type, IPPROTO_MPTCP);
        if (made >= 0)
            return made;
    }
    return real(domain, type, protocol);
}

/* gloo sets SO_REUSEADDR on connected sockets too and aborts if it cannot. MPTCP refuses it there, where it does nothing. */
int setsockopt(int socket, int level, int name, const void *value, socklen_t size) {
    int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");
    int status = real(socket, level, name, value, size);
    return status != 0 && errno == EINVAL && level == SOL_SOCKET && name == SO_REUSEADDR ? 0 : status;
}
