package conn

import (
	"math"
	"syscall"
	"time"
)

const tcpUserTimeout = 18 // TCP_USER_TIMEOUT of linux/tcp.h, which package syscall lacks

// SetUnacked makes the kernel abort the connection of socket fd when sent data is not acknowledged for d (tcp(7),
// TCP_USER_TIMEOUT); 0 means the kernel's default.
func SetUnacked(fd uintptr, d time.Duration) error {
	if d > 0 {
		d = max(d, time.Millisecond)
	}
	return syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(min(d.Milliseconds(), math.MaxInt32)))
}

// acknowledge makes the kernel send a delayed acknowledgement now, and the next few without delay (tcp(7), TCP_QUICKACK).
func acknowledge(fd uintptr) {
	syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_QUICKACK, 1) // ignore errors: without TCP_QUICKACK the relay is only slower
}

const acknowledges = true // acknowledge does something
