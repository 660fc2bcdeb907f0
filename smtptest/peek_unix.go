//go:build unix

package smtptest

import "syscall"

// peek reports without waiting whether a socket has input, as 1 or 0.
func peek(raw syscall.RawConn) (n int) {
	raw.Read(func(fd uintptr) bool {
		var b [1]byte
		if m, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK); err == nil {
			n = max(m, 0)
		}
		return true // done whatever Recvfrom returned: never wait for input here
	})
	return n
}
