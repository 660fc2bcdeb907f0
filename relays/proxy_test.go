package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// echo is a relay that answers each line with "250 " and that line, and keeps what it received.
type echo struct {
	listener net.Listener
	all      sync.WaitGroup

	mu   sync.Mutex // guards the fields below
	said []string   // by connection, once it has ended
	errs []error
}

func newEcho(t *testing.T) *echo {
	l, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{listener: l}
	e.all.Go(func() { // ends when the listener is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			e.all.Go(func() { e.serve(c) })
		}
	})
	return e
}

func (e *echo) serve(c net.Conn) {
	defer c.Close()
	var said strings.Builder
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		said.WriteString(line)
		if err == nil {
			_, err = fmt.Fprintf(c, "250 %s", line) // a reset is reported once: to the write if that comes first
		}
		if err != nil {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.said = append(e.said, said.String())
			e.errs = append(e.errs, err)
			return
		}
	}
}

func dialProxy(t *testing.T, e *echo) (*proxy, net.Conn, *bufio.Reader) {
	p, err := newProxy(e.listener.Addr().String(), 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", p.address())
	if err != nil {
		t.Fatal(err)
	}
	return p, c, bufio.NewReader(c)
}

func TestProxyCutsAtTheMarker(t *testing.T) {
	for _, test := range []struct {
		why  string
		cut  cut
		say  string
		told string // what the relay received in the end; not certain after a reset
	}{
		{"after the dot", cut{marker: []byte("last\r\n"), behind: true}, "one\r\nlast\r\n.\r\nMAIL\r\n", "one\r\nlast\r\n.\r\n"},
		{"after the dot, reset", cut{marker: []byte("last\r\n"), behind: true, reset: true}, "one\r\nlast\r\n.\r\n", ""},
		{"after a chunk", cut{marker: []byte("last\r\n"), behind: true}, "BDAT 6 LAST\r\nlast\r\nRSET\r\n", "BDAT 6 LAST\r\nlast\r\n"},
		{"in the last line", cut{marker: []byte("last\r\n")}, "one\r\nlast\r\n.\r\n", "one\r\nlas"},
	} {
		t.Run(test.why, func(t *testing.T) {
			e := newEcho(t)
			p, c, r := dialProxy(t, e)
			p.arm(test.cut)
			// In two writes, so that the marker is found even if it is split.
			half := strings.Index(test.say, "last") + 2
			io.WriteString(c, test.say[:half])
			io.WriteString(c, test.say[half:])
			for {
				line, err := r.ReadString('\n')
				if strings.Contains(line, "last") || strings.Contains(line, "250 .") {
					t.Errorf("the client received %q", line)
				}
				if err != nil {
					break
				}
			}
			p.close()
			e.listener.Close()
			e.all.Wait()
			e.mu.Lock()
			defer e.mu.Unlock()
			if !test.cut.reset && e.said[0] != test.told {
				t.Errorf("the relay received %q, want %q", e.said[0], test.told)
			}
			if test.cut.reset == errors.Is(e.errs[0], io.EOF) {
				t.Errorf("the relay's connection ended with %v", e.errs[0])
			}
			c.Close()
		})
	}
}

func TestProxyReportsWhetherTheClientWaited(t *testing.T) {
	for _, waits := range []bool{false, true} {
		e := newEcho(t)
		p, c, r := dialProxy(t, e)
		io.WriteString(c, "MAIL FROM:<>\r\n.\r\n")
		answers := 2
		if waits {
			for range answers {
				if _, err := r.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			answers = 0
		}
		// Without waiting, the client sends QUIT while replies are held back.
		io.WriteString(c, "QUIT\r\n")
		c.(*net.TCPConn).CloseWrite()
		io.ReadAll(r)
		p.close()
		e.listener.Close()
		e.all.Wait()
		times, always := p.ranAhead("QUIT")
		if times != 1 {
			t.Errorf("QUIT was seen %d times", times)
		}
		if waits && always {
			t.Error("a QUIT that waited is reported as one that did not")
		}
		n, atOnce, transactions := p.count()
		if n != 1 || atOnce != 1 || transactions != 1 {
			t.Errorf("counted %d connections, %d at once, %d transactions", n, atOnce, transactions)
		}
		c.Close()
	}
}
