// Socket options that the client sets, on Linux only.
package test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/smtprelay/smtprelay"
)

// socketConn counts the requests for its socket.
type socketConn struct {
	net.Conn
	asked *atomic.Int64
}

func (c socketConn) SyscallConn() (syscall.RawConn, error) { return rawSocket{asked: c.asked}, nil }

type rawSocket struct {
	syscall.RawConn
	asked *atomic.Int64
}

func (s rawSocket) Control(func(fd uintptr)) error {
	s.asked.Add(1)
	return nil
}

// replyInParts is a relay that reads a whole envelope before it replies, in one write or in one for each reply.
func replyInParts(conn net.Conn, parts bool) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	say := func(replies ...string) {
		if !parts {
			replies = []string{strings.Join(replies, "")}
		}
		for _, r := range replies {
			conn.Write([]byte(r)) // blocks until it is read
		}
	}
	say("220 relay\r\n")
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch line[:4] {
		case "EHLO":
			say("250-relay\r\n250 PIPELINING\r\n")
		case "DATA":
			say("250 sender\r\n", "250 recipient\r\n", "354 body\r\n")
			for line != ".\r\n" {
				if line, err = in.ReadString('\n'); err != nil {
					return
				}
			}
			say("250 accepted\r\n")
		case "QUIT":
			say("221 bye\r\n")
			return
		}
	}
}

// A relay that writes each reply separately waits for each acknowledgement. One that writes them together does not, and then its
// client must not pay anything.
func TestRepliesInPartsAreAcknowledgedAtOnce(t *testing.T) {
	const messages = 5
	for name, tt := range map[string]struct {
		parts   bool
		unacked int // times that Timeouts.Unacked is set
		asked   int
	}{
		"together":                 {false, 0, 0},
		"each separately":          {true, 0, 2 * messages},
		"together, with a limit":   {false, 1, 1},
		"in parts, with the limit": {true, 1, 2*messages + 1},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			cfg := smtprelay.Config{Addr: "relay.example:25", TLS: smtprelay.TLSNone, LocalName: "client.example"}
			if tt.unacked == 0 {
				cfg.Timeouts.Unacked = smtprelay.NoLimit
			}
			cfg.Dial = func(context.Context, string, string) (net.Conn, error) {
				client, relay := net.Pipe()
				go replyInParts(relay, tt.parts) // ends with the connection
				return socketConn{client, &asked}, nil
			}
			client := newClient(t, cfg)
			for i := range messages {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Fatal(err)
				}
			}
			want(t, "requests for the socket", int(asked.Load()), tt.asked)
		})
	}
}

// Linux's TCP_USER_TIMEOUT also ends a connection if the relay's window is full and its kernel answers.
func TestLimitOfAcknowledgementsIsLiftedForLargeBodies(t *testing.T) {
	for _, size := range []int{15 << 10, 17 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			var asked atomic.Int64
			cfg := smtprelay.Config{Addr: "relay.example:25", TLS: smtprelay.TLSNone, LocalName: "client.example"}
			cfg.Dial = func(context.Context, string, string) (net.Conn, error) {
				client, relay := net.Pipe()
				go replyInParts(relay, false) // ends with the connection
				return socketConn{client, &asked}, nil
			}
			client := newClient(t, cfg)
			m := numbered(0)
			m.Body = smtprelay.Bytes(body(size))
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			times := 1
			if size > 16<<10 {
				times = 3 // lifted, and set again
			}
			want(t, "times that the limit was set", int(asked.Load()), times)
		})
	}
}
