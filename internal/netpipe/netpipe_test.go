package netpipe

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// result is what a Read or Write returned.
type result struct {
	n   int
	err error
}

// start runs f in the background. In a bubble, finished returns its result, or nil if f is blocked.
func start(f func() (int, error)) (finished func(t *testing.T) *result) {
	var mu sync.Mutex
	var r *result
	go func() { // ends with f
		n, err := f()
		mu.Lock()
		defer mu.Unlock()
		r = &result{n, err}
	}()
	return func(t *testing.T) *result {
		t.Helper()
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		return r
	}
}

func mustWrite(t *testing.T, c io.Writer, s string) {
	t.Helper()
	if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
		t.Fatalf("Write(%q): got %d, %v, want %d, nil", s, n, err, len(s))
	}
}

func mustRead(t *testing.T, c io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v, want %q", got[:n], err, want)
	}
}

// conn is what *Conn and *net.TCPConn have in common.
type conn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// tcp returns the two ends of a TCP connection.
func tcp(t *testing.T) (client, server conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// TestConnBehavesLikeTCP runs each case on a real TCP connection too. a and b are its ends; a case reads whatever must have
// arrived before it goes on.
func TestConnBehavesLikeTCP(t *testing.T) {
	for _, tt := range []struct {
		why string
		run func(t *testing.T, a, b conn)
	}{
		{"bytes arrive in order, in both directions at once", func(t *testing.T, a, b conn) {
			mustWrite(t, a, "one")
			mustWrite(t, b, "three")
			mustWrite(t, a, "two")
			mustRead(t, a, "three")
			mustRead(t, b, "onetwo")
		}},
		{"a read returns what has arrived", func(t *testing.T, a, b conn) {
			mustWrite(t, a, "ab")
			mustRead(t, b, "a")
			if n, err := b.Read(make([]byte, 10)); n != 1 || err != nil {
				t.Errorf("got %d, %v, want 1, nil", n, err)
			}
		}},
		{"an empty read or write does not wait", func(t *testing.T, a, b conn) {
			if n, err := a.Read(nil); n != 0 || err != nil {
				t.Errorf("Read: got %d, %v, want 0, nil", n, err)
			}
			if n, err := a.Write(nil); n != 0 || err != nil {
				t.Errorf("Write: got %d, %v, want 0, nil", n, err)
			}
		}},
		{"after CloseWrite the peer reads the rest and then EOF, and may go on writing", func(t *testing.T, a, b conn) {
			mustWrite(t, a, "rest")
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(b); string(got) != "rest" || err != nil {
				t.Errorf("got %q, %v, want %q and EOF", got, err, "rest")
			}
			mustWrite(t, b, "answer")
			mustRead(t, a, "answer")
		}},
		{"after CloseWrite nothing can be written", func(t *testing.T, a, b conn) {
			a.CloseWrite()
			if n, err := a.Write([]byte("x")); n != 0 || !errors.Is(err, syscall.EPIPE) {
				t.Errorf("got %d, %v, want 0, EPIPE", n, err)
			}
		}},
		{"after a Close with no input left the peer reads the rest and then EOF", func(t *testing.T, a, b conn) {
			mustWrite(t, b, "x")
			mustRead(t, a, "x")
			mustWrite(t, a, "rest")
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(b); string(got) != "rest" || err != nil {
				t.Errorf("got %q, %v, want %q and EOF", got, err, "rest")
			}
		}},
		{"a Close with input left resets", func(t *testing.T, a, b conn) {
			mustWrite(t, b, "xy")
			mustRead(t, a, "x") // so the y has arrived too
			a.Close()
			if n, err := b.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %d, %v, want 0, ECONNRESET", n, err)
			}
		}},
		{"SetLinger 0 and Close reset", func(t *testing.T, a, b conn) {
			if err := a.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			a.Close()
			if n, err := b.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %d, %v, want 0, ECONNRESET", n, err)
			}
			if n, err := b.Write([]byte("x")); n != 0 || !errors.Is(err, syscall.EPIPE) {
				t.Errorf("Write: got %d, %v, want 0, EPIPE", n, err)
			}
		}},
		{"another SetLinger leaves the connection alone", func(t *testing.T, a, b conn) {
			if err := a.SetLinger(-1); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, a, "x")
			a.Close()
			mustRead(t, b, "x")
			if n, err := b.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("got %d, %v, want 0, EOF", n, err)
			}
		}},
		{"after its own Close an end does nothing", func(t *testing.T, a, b conn) {
			mustWrite(t, b, "x")
			a.Close()
			if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read: got %d, %v, want 0, net.ErrClosed", n, err)
			}
			if n, err := a.Write([]byte("x")); n != 0 || !errors.Is(err, net.ErrClosed) {
				t.Errorf("Write: got %d, %v, want 0, net.ErrClosed", n, err)
			}
		}},
		{"a deadline in the past ends a read even if there is input, and a write even if there is room", func(t *testing.T, a, b conn) {
			mustWrite(t, b, "xy")
			mustRead(t, a, "x")
			if err := a.SetDeadline(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read: got %d, %v, want 0, os.ErrDeadlineExceeded", n, err)
			}
			if n, err := a.Write([]byte("z")); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Write: got %d, %v, want 0, os.ErrDeadlineExceeded", n, err)
			}
			a.SetDeadline(time.Time{})
			mustRead(t, a, "y")
			mustWrite(t, a, "z")
			mustRead(t, b, "z")
		}},
		{"each direction has its own deadline", func(t *testing.T, a, b conn) {
			a.SetReadDeadline(time.Unix(1, 0))
			mustWrite(t, a, "x")
			a.SetReadDeadline(time.Time{})
			a.SetWriteDeadline(time.Unix(1, 0))
			mustWrite(t, b, "y")
			mustRead(t, a, "y")
			mustRead(t, b, "x")
		}},
		{"errors are net.Errors that name the operation, and only time-outs report Timeout", func(t *testing.T, a, b conn) {
			a.SetReadDeadline(time.Unix(1, 0))
			_, timeout := a.Read(make([]byte, 1))
			a.CloseWrite()
			_, pipe := a.Write([]byte("x"))
			for _, c := range []struct {
				err     error
				op      string
				timeout bool
			}{{timeout, "read", true}, {pipe, "write", false}} {
				var e *net.OpError
				if !errors.As(c.err, &e) || e.Op != c.op || e.Timeout() != c.timeout {
					t.Errorf("got %#v, want a *net.OpError of a %s, time-out %v", c.err, c.op, c.timeout)
				}
			}
			if _, err := b.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("got %v, want the bare io.EOF", err)
			}
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			for _, kind := range []struct {
				name string
				pair func(t *testing.T) (a, b conn)
			}{
				{"netpipe", func(t *testing.T) (a, b conn) { return New(0) }},
				{"netpipe from the other end", func(t *testing.T) (a, b conn) { b, a = New(0); return }},
				{"tcp", tcp},
			} {
				t.Run(kind.name, func(t *testing.T) {
					a, b := kind.pair(t)
					defer a.Close()
					defer b.Close()
					tt.run(t, a, b)
				})
			}
		})
	}
}

func TestWriteReturnsBeforeItIsReadIfItFitsIntoTheBuffer(t *testing.T) {
	for _, tt := range []struct {
		buffer, holds int
	}{{1, 1}, {10, 10}, {0, DefaultBuffer}, {-1, DefaultBuffer}} {
		synctest.Test(t, func(t *testing.T) {
			a, b := New(tt.buffer)
			sent := bytes.Repeat([]byte("0123456789"), tt.holds/10+1)[:tt.holds+1]
			mustWrite(t, a, string(sent[:tt.holds]))
			if got := b.Unread(); got != tt.holds {
				t.Errorf("got %d unread, want %d", got, tt.holds)
			}
			more := start(func() (int, error) { return a.Write(sent[tt.holds:]) })
			if r := more(t); r != nil {
				t.Fatalf("buffer %d: Write of one more returned %+v", tt.buffer, r)
			}
			mustWrite(t, b, "x") // the other direction has its own buffer
			if got := a.Unread(); got != 1 {
				t.Errorf("got %d unread on the other side, want 1", got)
			}
			mustRead(t, b, string(sent[:1]))
			if r := more(t); r == nil || *r != (result{1, nil}) {
				t.Fatalf("after a read Write returned %+v, want 1, nil", r)
			}
			if got := b.Unread(); got != tt.holds {
				t.Errorf("got %d unread, want %d", got, tt.holds)
			}
			mustRead(t, b, string(sent[1:]))
			if got := b.Unread(); got != 0 {
				t.Errorf("got %d unread, want 0", got)
			}
		})
	}
}

func TestLargeWritePassesASmallBufferInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := New(7)
		sent := strings.Repeat("0123456789", 1000)
		writing := start(func() (int, error) {
			defer a.Close()
			return a.Write([]byte(sent))
		})
		got, err := io.ReadAll(b)
		if string(got) != sent || err != nil {
			t.Errorf("got %d octets, %v, want %d", len(got), err, len(sent))
		}
		if r := writing(t); r == nil || *r != (result{len(sent), nil}) {
			t.Errorf("Write returned %+v, want %d, nil", r, len(sent))
		}
	})
}

func TestBlockedCallReturnsWhatHappensToTheConnection(t *testing.T) {
	read := func(c *Conn) func() (int, error) { return func() (int, error) { return c.Read(make([]byte, 1)) } }
	write := func(c *Conn) func() (int, error) { return func() (int, error) { return c.Write([]byte("0123456789")) } } // into a buffer of 4
	for _, tt := range []struct {
		why    string
		call   func(c *Conn) func() (int, error)
		happen func(own, peer *Conn)
		n      int
		want   error
	}{
		{"read, and the peer writes", read, func(own, peer *Conn) { peer.Write([]byte("x")) }, 1, nil},
		{"read, and the peer closes", read, func(own, peer *Conn) { peer.Close() }, 0, io.EOF},
		{"read, and the peer closes for writing", read, func(own, peer *Conn) { peer.CloseWrite() }, 0, io.EOF},
		{"read, and the peer resets", read, func(own, peer *Conn) { peer.Reset() }, 0, syscall.ECONNRESET},
		{"read, and the peer closes with input left", read, func(own, peer *Conn) { own.Write([]byte("x")); peer.Close() }, 0, syscall.ECONNRESET},
		{"read, and this end closes", read, func(own, peer *Conn) { own.Close() }, 0, net.ErrClosed},
		{"read, and this end resets", read, func(own, peer *Conn) { own.Reset() }, 0, net.ErrClosed},
		{"read, and its deadline moves into the past", read, func(own, peer *Conn) { own.SetReadDeadline(time.Unix(1, 0)) }, 0, os.ErrDeadlineExceeded},
		{"read, and time passes", read, func(own, peer *Conn) { own.SetReadDeadline(time.Now().Add(time.Hour)); time.Sleep(time.Hour) }, 0, os.ErrDeadlineExceeded},

		{"write, and the peer reads all", write, func(own, peer *Conn) { io.CopyN(io.Discard, peer, 10) }, 10, nil},
		{"write, and the peer closes", write, func(own, peer *Conn) { peer.Close() }, 4, syscall.EPIPE},
		{"write, and the peer resets", write, func(own, peer *Conn) { peer.Reset() }, 4, syscall.EPIPE},
		{"write, and this end closes", write, func(own, peer *Conn) { own.Close() }, 4, net.ErrClosed},
		{"write, and this end resets", write, func(own, peer *Conn) { own.Reset() }, 4, net.ErrClosed},
		{"write, and this end closes for writing", write, func(own, peer *Conn) { own.CloseWrite() }, 4, syscall.EPIPE},
		{"write, and its deadline moves into the past", write, func(own, peer *Conn) { own.SetWriteDeadline(time.Unix(1, 0)) }, 4, os.ErrDeadlineExceeded},
		{"write, and time passes", write, func(own, peer *Conn) { own.SetWriteDeadline(time.Now().Add(time.Hour)); time.Sleep(time.Hour) }, 4, os.ErrDeadlineExceeded},
		{"write, and the peer reads some before time passes", write, func(own, peer *Conn) {
			own.SetWriteDeadline(time.Now().Add(time.Hour))
			io.CopyN(io.Discard, peer, 3)
			time.Sleep(time.Hour)
		}, 7, os.ErrDeadlineExceeded},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				own, peer := New(4)
				finished := start(tt.call(own))
				if r := finished(t); r != nil {
					t.Fatalf("returned %+v before anything happened", r)
				}
				tt.happen(own, peer)
				r := finished(t)
				if r == nil {
					own.Close()
					t.Fatal("still blocked")
				}
				if r.n != tt.n || !errors.Is(r.err, tt.want) {
					t.Errorf("got %d, %v, want %d, %v", r.n, r.err, tt.n, tt.want)
				}
			})
		})
	}
}

func TestResetDestroysTheDataInFlightInBothDirections(t *testing.T) {
	a, b := New(0)
	mustWrite(t, a, "lost")
	mustWrite(t, b, "lost too")
	a.Reset()
	if got := a.Unread() + b.Unread(); got != 0 {
		t.Errorf("got %d octets still in flight, want 0", got)
	}
	for _, tt := range []struct {
		why  string
		call func([]byte) (int, error)
		want error
	}{
		{"a read by the peer", b.Read, syscall.ECONNRESET},
		{"a write by the peer", b.Write, syscall.EPIPE},
		{"a read by the end that reset", a.Read, net.ErrClosed},
		{"a write by the end that reset", a.Write, net.ErrClosed},
	} {
		if n, err := tt.call(make([]byte, 1)); n != 0 || !errors.Is(err, tt.want) {
			t.Errorf("%s: got %d, %v, want 0, %v", tt.why, n, err, tt.want)
		}
	}
}

func TestLastDeadlineSetCounts(t *testing.T) {
	const short, long = time.Second, time.Minute
	for _, tt := range []struct {
		why  string
		set  func(c *Conn)
		want time.Duration // after which the read ends; 0 means never
	}{
		{"set once", func(c *Conn) { c.SetReadDeadline(time.Now().Add(short)) }, short},
		{"set for both directions", func(c *Conn) { c.SetDeadline(time.Now().Add(short)) }, short},
		{"moved back", func(c *Conn) {
			c.SetReadDeadline(time.Now().Add(short))
			c.SetReadDeadline(time.Now().Add(long))
		}, long},
		{"moved forward", func(c *Conn) {
			c.SetReadDeadline(time.Now().Add(long))
			c.SetReadDeadline(time.Now().Add(short))
		}, short},
		{"taken away", func(c *Conn) {
			c.SetReadDeadline(time.Now().Add(short))
			c.SetReadDeadline(time.Time{})
		}, 0},
		{"set for writing only", func(c *Conn) { c.SetWriteDeadline(time.Now().Add(short)) }, 0},
		{"set again after it had passed", func(c *Conn) {
			c.SetReadDeadline(time.Unix(1, 0))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %v, want os.ErrDeadlineExceeded", err)
			}
			c.SetReadDeadline(time.Now().Add(short))
		}, short},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, peer := New(0)
				began := time.Now()
				tt.set(c)
				var ended time.Duration
				reading := start(func() (int, error) {
					n, err := c.Read(make([]byte, 1))
					ended = time.Since(began)
					return n, err
				})
				time.Sleep(time.Hour)
				r := reading(t)
				if tt.want == 0 {
					if r != nil {
						t.Fatalf("returned %+v", r)
					}
					peer.Close()
					return
				}
				if r == nil || !errors.Is(r.err, os.ErrDeadlineExceeded) {
					t.Fatalf("got %+v, want os.ErrDeadlineExceeded", r)
				}
				if ended != tt.want {
					t.Errorf("ended after %v, want %v", ended, tt.want)
				}
			})
		})
	}
}

func TestDeadlineMovedAsItPassesDoesNotExpire(t *testing.T) {
	// The timer has fired, and its function waits for the lock that the mover holds.
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			c, peer := New(0)
			at := time.Now().Add(time.Second)
			c.SetReadDeadline(at)
			moved := make(chan error, 1)
			time.AfterFunc(time.Until(at), func() {
				moved <- c.SetReadDeadline(at.Add(time.Minute)) // in the same instant, before or after
			})
			<-moved
			synctest.Wait()
			mustWrite(t, peer, "x")
			mustRead(t, c, "x")
			c.Close()
		}
	})
}

func TestClosedEndLeavesNoTimerRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := New(0)
		a.SetDeadline(time.Now().Add(time.Hour))
		b.SetDeadline(time.Now().Add(time.Hour))
		a.Close()
		b.Reset()
		for _, h := range []*half{a.in, a.out} {
			for _, d := range []deadline{h.reading, h.writing} {
				if d.timer.Stop() {
					t.Error("a timer was still running")
				}
			}
		}
		if err := a.Close(); err != nil {
			t.Errorf("second Close: got %v, want nil", err)
		}
	})
}

func TestConnNamesItsEnds(t *testing.T) {
	a, b := New(0)
	if a.LocalAddr().String() != "client" || a.RemoteAddr().String() != "server" {
		t.Errorf("client: got %v to %v", a.LocalAddr(), a.RemoteAddr())
	}
	if b.LocalAddr() != a.RemoteAddr() || b.RemoteAddr() != a.LocalAddr() {
		t.Errorf("server: got %v to %v", b.LocalAddr(), b.RemoteAddr())
	}
	if got := a.LocalAddr().Network(); got != "pipe" {
		t.Errorf("got network %q, want %q", got, "pipe")
	}
}

func TestConnMayBeUsedConcurrently(t *testing.T) {
	const writers, each = 8, 200
	a, b := New(16)
	var writing sync.WaitGroup
	for range writers {
		writing.Go(func() {
			for range each {
				if _, err := a.Write([]byte("x")); err != nil {
					t.Error(err)
				}
				a.SetDeadline(time.Now().Add(time.Hour))
				a.Unread()
			}
		})
	}
	var mu sync.Mutex
	total := 0
	var reading sync.WaitGroup
	for range 4 {
		reading.Go(func() {
			for {
				n, err := b.Read(make([]byte, 5))
				mu.Lock()
				total += n
				mu.Unlock()
				if err == io.EOF {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writing.Wait()
	a.CloseWrite()
	reading.Wait()
	if total != writers*each {
		t.Errorf("got %d octets, want %d", total, writers*each)
	}
}

func TestListenerAcceptsInTheOrderOfDials(t *testing.T) {
	l := Listen(3)
	defer l.Close()
	var clients []*Conn
	for i := range 3 {
		c, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		mustWrite(t, c, fmt.Sprint(i))
	}
	for i, c := range clients {
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		mustRead(t, s, fmt.Sprint(i))
		mustWrite(t, s, "hi")
		mustRead(t, c, "hi")
	}
	if got := clients[0].out.max; got != 3 {
		t.Errorf("got a buffer of %d, want 3", got)
	}
	if got := l.Addr().String(); got != "listener" {
		t.Errorf("got address %q", got)
	}
}

func TestClosedListenerRefusesAndResets(t *testing.T) {
	l := Listen(0)
	accepted, err := l.Dial()
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	waiting, err := l.Dial()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close: got %v", err)
	}
	if err := l.Close(); err == nil {
		t.Error("second Close: got no error")
	}
	if _, err := waiting.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection that was not accepted: got %v, want ECONNRESET", err)
	}
	mustWrite(t, accepted, "still there")
	mustRead(t, server, "still there")
	if _, err := l.Dial(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Dial: got %v, want ECONNREFUSED", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: got %v, want net.ErrClosed", err)
	}
}

func TestListenerCloseEndsBlockedCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Listen(0)
		accepting := start(func() (int, error) { _, err := l.Accept(); return 0, err })
		if r := accepting(t); r != nil {
			t.Fatalf("Accept returned %+v without a Dial", r)
		}
		l.Close()
		if r := accepting(t); r == nil || !errors.Is(r.err, net.ErrClosed) {
			t.Errorf("Accept: got %+v, want net.ErrClosed", r)
		}

		l = Listen(0)
		for range cap(l.accepted) {
			if _, err := l.Dial(); err != nil {
				t.Fatal(err)
			}
		}
		dialling := start(func() (int, error) { _, err := l.Dial(); return 0, err })
		if r := dialling(t); r != nil {
			t.Fatalf("Dial returned %+v with a full backlog", r)
		}
		l.Close()
		if r := dialling(t); r == nil {
			t.Error("Dial is still blocked")
		}
	})
}

func TestDialThatRacesWithCloseIsRefusedOrReset(t *testing.T) {
	// Else a client would wait for ever on a connection that is never accepted.
	const rounds, dialers = 500, 64
	for range rounds {
		l := Listen(0)
		conns := make(chan *Conn, dialers)
		var racing sync.WaitGroup
		for i := range dialers {
			racing.Go(func() {
				c, err := l.Dial()
				switch {
				case err == nil:
					conns <- c
				case !errors.Is(err, syscall.ECONNREFUSED):
					t.Errorf("got %v, want ECONNREFUSED", err)
				}
			})
			if i == dialers/2 {
				racing.Go(func() { l.Close() })
			}
		}
		racing.Wait()
		close(conns)
		for c := range conns {
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("got %v, want ECONNRESET", err)
			}
		}
	}
}
