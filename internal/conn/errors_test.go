package conn

// Tests of what progress.go makes of the errors of a socket.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
)

func TestLostConnectionIsToldFromOtherErrors(t *testing.T) {
	read := func(err error) error { return &net.OpError{Op: "read", Net: "tcp", Err: err} }
	for _, c := range []struct {
		name string
		err  error
		want bool
	}{
		{"end of input", io.EOF, true},
		{"end within a TLS record", io.ErrUnexpectedEOF, true},
		{"closed net.Pipe", io.ErrClosedPipe, true},
		{"reset", read(os.NewSyscallError("read", syscall.ECONNRESET)), true},
		{"write after a reset", &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", syscall.EPIPE)}, true},
		{"aborted by the system", read(os.NewSyscallError("read", syscall.ECONNABORTED)), true},
		{"reset on Windows", read(os.NewSyscallError("wsarecv", syscall.Errno(10054))), true},
		{"aborted by Windows", read(os.NewSyscallError("wsarecv", syscall.Errno(10053))), true},
		{"wrapped by TLS", fmt.Errorf("tls: %w", read(syscall.Errno(10054))), true},

		{"refused dial", &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}, false},
		{"deadline", read(os.ErrDeadlineExceeded), false},
		{"closed by this side", read(net.ErrClosed), false},
		{"ended context", context.Canceled, false},
		{"another error of Windows", read(syscall.Errno(10060)), false},
		{"another error", errors.New("connection reset by peer"), false},
		{"none", nil, false},
	} {
		if got := ClosedByPeer(c.err); got != c.want {
			t.Errorf("%s (%v): got %t, want %t", c.name, c.err, got, c.want)
		}
	}
}
