package sockets

import (
	"net"
	"syscall"
)

// isReset reports whether the system knows that the connection is gone, although nobody has read that yet.
func isReset(c *net.TCPConn) (gone bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	const closed = 7 // TCP_CLOSE, the state of a connection that got a RST
	err = raw.Control(func(fd uintptr) {
		info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO) // its first octets
		gone = err == nil && (info&0xff == closed || info>>24&0xff == closed)
	})
	return gone || err != nil
}
