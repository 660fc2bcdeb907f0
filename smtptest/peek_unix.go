//go:build unix

package smtptest

import "syscall"

// peek tells whether a socket has input, as 1 or 0, without waiting for any.
func peek(raw syscall.RawConn) (n int) {
	raw.Read(func(fd uintptr) bool {
		var b [1]byte
		if m, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK); err == nil {
			n = max(m, 0)
		}
		return true // whatever it said: the socket does not block, and nobody is to wait here
	})
	return n
}
