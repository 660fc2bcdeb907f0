package sockets

import (
	"encoding/binary"
	"net"
	"syscall"
	"testing"
)

// tcpState returns the system's state of a connection, whatever was read and written so far.
func tcpState(c *net.TCPConn) (s connState) {
	raw, err := c.SyscallConn()
	if err != nil {
		return over
	}
	err = raw.Control(func(fd uintptr) {
		info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO) // its first four octets
		if err != nil {
			return
		}
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], uint32(info))
		switch b[0] { // include/net/tcp_states.h
		case 1: // TCP_ESTABLISHED
			s = established
		case 8: // TCP_CLOSE_WAIT
			s = halfClosed
		}
	})
	if err != nil {
		return over
	}
	return s
}

// TestOneConnectionTooMany opens a second connection where one may be open, in each state that the first can be in.
func TestOneConnectionTooMany(t *testing.T) {
	for _, test := range []struct {
		first     string
		end       func(client, relay *net.TCPConn)
		impatient bool
		want      bool
	}{
		{first: "open", end: func(_, _ *net.TCPConn) {}, want: true},
		{first: "open, impatient client", end: func(_, _ *net.TCPConn) {}, impatient: true, want: true},
		{first: "reset", end: func(client, _ *net.TCPConn) { reset(client) }},
		{first: "closed by the client only", end: func(client, _ *net.TCPConn) { client.Close() }, want: true},
		{first: "closed by an impatient client", end: func(client, _ *net.TCPConn) { client.Close() }, impatient: true},
		{first: "closed by the relay", end: func(_, relay *net.TCPConn) { relay.CloseWrite() }},
		{first: "closed by the relay, which has not read all", end: func(client, relay *net.TCPConn) {
			client.Write(make([]byte, 1000))
			relay.CloseWrite()
			client.Close()
		}},
	} {
		c := count(listen(t), setup{maxConns: 1})
		c.impatient = test.impatient
		defer c.Close()
		for n := range 2 {
			client, err := net.Dial("tcp", c.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			relay, err := c.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer relay.Close()
			if n == 0 {
				test.end(client.(*net.TCPConn), relay.(*counted).TCPConn)
			}
		}
		if got := c.exceeded > 0; got != test.want {
			t.Errorf("the first is %s: over the limit is %v, want %v", test.first, got, test.want)
		}
	}
}
