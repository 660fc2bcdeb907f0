// Opening a connection: addresses, Dial, the greeting, EHLO.
package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A burst opens many connections at once. If all of them fail, that is one attempt of each waiting Send, not ten.
func TestDialsThatFailTogetherAreOneAttempt(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		back := time.Now().Add(time.Second)
		var nobody noRelay
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 2
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Now().Before(back) {
				time.Sleep(time.Until(back))
				return nobody.Dial(ctx, network, addr)
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 10))
		want(t, "dials in vain", len(nobody.dials()), 10)
	})
}

// openFiles is the number of this process's open files, or 0 if the system does not tell.
func openFiles() int {
	files, _ := os.ReadDir("/dev/fd")
	return len(files)
}

// countedConn counts open connections.
type countedConn struct {
	net.Conn
	open *atomic.Int64
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

func TestFailedGreetingsLeaveNoDescriptorOpen(t *testing.T) {
	const times = 250
	greetings := []string{"554 5.7.1 not you", "421 4.3.2 not now", "hello there", ""}
	relay := &relaytest.Relay{Answer: func(n int, _ string) string { return greetings[n%len(greetings)] + relaytest.Hangup }}
	l, err := relay.Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var open atomic.Int64
	client := newClient(t, smtprelay.Config{
		Addr:  l.Addr().String(),
		TLS:   smtprelay.TLSNone,
		Retry: smtprelay.Retry{MaxAttempts: 1, MinBackoff: 1, MaxBackoff: 1},
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			open.Add(1)
			return &countedConn{Conn: conn, open: &open}, nil
		},
	})
	before := openFiles()
	for range times * len(greetings) {
		if _, err := client.Send(t.Context(), numbered(0)); smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
			t.Fatal(err)
		}
	}
	client.Close()
	want(t, "connections open", int(open.Load()), 0)
	if n := int(client.Stats().DialErrors); n < times*len(greetings) {
		t.Errorf("Stats().DialErrors: got %d, want %d at least", n, times*len(greetings))
	}
	atMost(t, "open files", openFiles(), before+5) // the runtime and the relay may hold a few, but not one for each failure
}

// addressedConn is a connection with another local address.
type addressedConn struct {
	net.Conn
	local net.Addr
}

func (c addressedConn) LocalAddr() net.Addr { return c.local }

// Relays refuse a client that calls itself localhost, and some ban it.
func TestEHLONameIsNeverLocalhost(t *testing.T) {
	host, err := os.Hostname()
	named := err == nil && strings.Contains(host, ".") && !strings.HasPrefix(host, "localhost.")
	for _, test := range []struct{ local, want string }{
		{"192.0.2.7", "[192.0.2.7]"},
		{"2001:db8::7", "[IPv6:2001:db8::7]"},
		{"127.0.0.1", "[127.0.0.1]"},
		{"::1", "[IPv6:::1]"},
		{"::ffff:192.0.2.7", "[192.0.2.7]"},
	} {
		synctest.Test(t, func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
			var said string
			relay.Fault(smtptest.Fault{At: smtptest.EHLO, Count: -1, When: func(e smtptest.Event) bool {
				said = strings.TrimPrefix(e.Line, "EHLO ")
				return false
			}})
			cfg := configOf(relay)
			cfg.LocalName = ""
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := relay.Dial(ctx, network, addr)
				return addressedConn{conn, &net.TCPAddr{IP: net.ParseIP(test.local), Port: 4321}}, err
			}
			client := newClient(t, cfg)
			sendNumbered(t, client, 1, 1)
			if want := map[bool]string{true: host, false: test.want}[named]; said != want {
				t.Errorf("from %s: EHLO %s, want %s", test.local, said, want)
			}
		})
	}
}

// A nameserver answers each query for an IPv4 address with all of its addresses, in order, and knows no others. It uses DNS over
// a stream (RFC 1035, 4.2.2).
type nameserver struct {
	addresses []string
	asked     atomic.Int64
}

// resolver uses only the nameserver.
func (ns *nameserver) resolver() *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go ns.serve(server) // ends when the client closes
			return client, nil
		},
	}
}

func (ns *nameserver) serve(conn net.Conn) {
	defer conn.Close()
	for {
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		answer := ns.answer(query)
		binary.BigEndian.PutUint16(size[:], uint16(len(answer)))
		if _, err := conn.Write(append(size[:], answer...)); err != nil {
			return
		}
	}
}

// answer returns the reply to a query with one question (RFC 1035, 4.1).
func (ns *nameserver) answer(query []byte) []byte {
	const header, typeA, ttl = 12, 1, 60
	end := header + bytes.IndexByte(query[header:], 0) + 1 // of the name
	question := query[header : end+4]                      // with type and class
	count := 0
	if binary.BigEndian.Uint16(query[end:]) == typeA {
		ns.asked.Add(1)
		count = len(ns.addresses)
	}
	a := append([]byte{}, query[:2]...)                         // the query's ID
	a = append(a, 0x81, 0x80, 0, 1, 0, byte(count), 0, 0, 0, 0) // a response without error: one question, count answers
	a = append(a, question...)
	for _, addr := range ns.addresses[:count] {
		a = append(a, 0xc0, header) // the name in the question
		a = append(a, 0, typeA, 0, 1, 0, 0, 0, ttl, 0, net.IPv4len)
		a = append(a, net.ParseIP(addr).To4()...)
	}
	return a
}

// The first addresses of a name are dead: a dial skips them without an error.
func TestDeadAddressesOfANameAreSkipped(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.CertNames = []string{"relay.test"} })
	_, port, err := net.SplitHostPort(relay.Addr())
	if err != nil {
		t.Fatal(err)
	}
	ns := &nameserver{addresses: []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.1"}}
	dialer := net.Dialer{Resolver: ns.resolver()}
	cfg := configOf(relay)
	cfg.Addr = net.JoinHostPort("relay.test", port)
	cfg.Retry.MaxAttempts = 1
	cfg.Dial = dialer.DialContext
	client := newClient(t, cfg)
	allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 50))
	want(t, "Stats().DialErrors", int(client.Stats().DialErrors), 0)
	if ns.asked.Load() == 0 {
		t.Error("the nameserver got no query")
	}

	// If all addresses are dead, the error names the relay and what to check.
	dead := nameserver{addresses: ns.addresses[:3]}
	dialer.Resolver = dead.resolver()
	cfg.Dial = dialer.DialContext
	s := sendOne(t.Context(), newClient(t, cfg), 100)
	for _, words := range []string{"dial relay.test:" + port, "check host and port"} {
		if !contains(s.err, words) {
			t.Errorf("%v; want it to contain %q", s.err, words)
		}
	}
	if e := failure(s.err); e.Attempts != 1 || e.Outcome != smtprelay.NotAccepted || !e.Temporary() {
		t.Errorf("%v, %d attempts; want one, not accepted, temporary", s.err, e.Attempts)
	}
}

func TestAllWaitersContinueOnceADialSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		var dials atomic.Int64
		down.Store(true)
		inner := relaytest.Dial(0, func(n int, l string) string {
			if l == "." && n == 1 {
				time.Sleep(9 * time.Minute)
			}
			return relaytest.Agree("250 SIZE 1000", l)
		})
		c := bubbleClient(t, smtprelay.Config{Dial: func(ctx context.Context, a, b string) (net.Conn, error) {
			dials.Add(1)
			if down.Load() {
				return nil, errors.New("connection refused")
			}
			return inner(ctx, a, b)
		}})
		began := time.Now()
		took := make(chan time.Duration, 5)
		for range 5 {
			go func() {
				_, err := c.Send(t.Context(), shortMessage("b@y.example"))
				if err != nil {
					t.Log(err)
				}
				took <- time.Since(began)
			}()
		}
		synctest.Wait()
		down.Store(false)
		for range 4 { // all but the one on the slow connection
			if d := <-took; d > 10*time.Second {
				t.Errorf("a message took %v", d)
			}
		}
		<-took
		if n := dials.Load(); n > 5+5 { // those that were begun before the first was refused count too
			t.Errorf("%d connections tried, want one that was refused and another one for each message at most", n)
		}
		c.Close()
	})
}

// noDeadlines is a connection without deadlines, like those through SSH.
type noDeadlines struct{ net.Conn }

var errNoDeadline = errors.New("deadline not supported")

func (noDeadlines) SetDeadline(time.Time) error { return errNoDeadline }

func (noDeadlines) SetReadDeadline(time.Time) error { return errNoDeadline }

func (noDeadlines) SetWriteDeadline(time.Time) error { return errNoDeadline }

func TestDialThatReturnsNoUsableConnectionIsAnError(t *testing.T) {
	silent := relaytest.Dial(0, func(_ int, l string) string { return "" })
	for _, test := range []struct {
		dial func(context.Context, string, string) (net.Conn, error)
		want string
	}{
		{func(context.Context, string, string) (net.Conn, error) { return nil, nil }, "neither a connection nor an error"},
		{func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := silent(ctx, network, addr)
			return noDeadlines{conn}, err
		}, "does not support deadlines: deadline not supported"},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := bubbleClient(t, smtprelay.Config{Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: test.dial})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			_, err := c.Send(ctx, shortMessage("b@y.example"))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
			c.Close() // does not wait for the relay
		})
	}
}
