package conn

import (
	"math"
	"syscall"
	"time"
)

const tcpUserTimeout = 18 // TCP_USER_TIMEOUT of linux/tcp.h, which package syscall lacks

// SetUnacked has the kernel give the connection of socket fd up once what was sent has had no acknowledgement for d (tcp(7),
// TCP_USER_TIMEOUT); 0 means as long as the kernel likes.
func SetUnacked(fd uintptr, d time.Duration) error {
	if d > 0 {
		d = max(d, time.Millisecond)
	}
	return syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(min(d.Milliseconds(), math.MaxInt32)))
}

// acknowledge has the kernel send the acknowledgement now that it holds back, and the next few at once (tcp(7), TCP_QUICKACK).
func acknowledge(fd uintptr) {
	syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_QUICKACK, 1) // without it the relay is slower, and no more
}

const acknowledges = true // acknowledge does something
