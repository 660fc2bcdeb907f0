package smtprelay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// While a machine sleeps the monotonic clock stops, and so does the timer that ends idle connections.
func TestConnectionThatSleptPastItsIdleTimeIsNotUsed(t *testing.T) {
	for _, slept := range []time.Duration{0, 29 * time.Second, 30 * time.Second, 8 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var dials atomic.Int64
			var relays sync.WaitGroup
			c, err := New(Config{Addr: "relay.example:25", TLS: TLSNone, Dial: func(context.Context, string, string) (net.Conn, error) {
				dials.Add(1)
				near, far := netpipe.New(4096)
				relays.Go(func() { acceptAll(far) })
				return near, nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			m := Message{From: "a@x.example", To: []string{"b@y.example"}, Body: Bytes([]byte("Subject: x\r\n\r\nx\r\n"))}
			for range 2 {
				if _, err := c.Send(t.Context(), m); err != nil {
					t.Fatal(err)
				}
				c.pool.mu.Lock()
				for s := range c.pool.sessions {
					s.idleSince = s.idleSince.Round(0).Add(-slept) // only by the wall clock
				}
				c.pool.mu.Unlock()
			}
			want := int64(1)
			if slept >= 30*time.Second {
				want = 2
			}
			if n := dials.Load(); n != want {
				t.Errorf("slept for %v: %d connections, want %d", slept, n, want)
			}
			c.Close()
			relays.Wait()
		})
	}
}

// Slots are taken and freed while the limit is lowered and raised.
func TestLimitHoldsInWhateverOrderItIsLoweredAndRaised(t *testing.T) {
	const most = 5
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		s := newSlots(most)
		limit, open := most, 0
		for step := range 100 {
			switch r.IntN(4) {
			case 0:
				room := open < limit
				if taken := s.take(); taken != room {
					t.Fatalf("seed %d, step %d: %d of %d open, and one more taken: %t", seed, step, open, limit, taken)
				}
				if room {
					open++
				}
			case 1:
				if open > 0 {
					s.free()
					open--
				}
			case 2:
				to := r.IntN(most + 1)
				s.lower(to)
				limit = min(limit, max(to, 1))
			case 3:
				limit = min(limit+1, most)
				if lowered := s.raise(); lowered != (limit < most) {
					t.Fatalf("seed %d, step %d: raised to %d; still lowered: %t", seed, step, limit, lowered)
				}
			}
			if s.limit() != limit || s.open != open {
				t.Fatalf("seed %d, step %d: %d of %d open, want %d of %d", seed, step, s.open, s.limit(), open, limit)
			}
		}
	}
}

// acceptAll is a relay that accepts everything.
func acceptAll(conn net.Conn) {
	defer conn.Close()
	fmt.Fprint(conn, "220 relay.example ESMTP\r\n")
	inBody := false
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		switch line := lines.Text(); {
		case inBody && line != ".":
		case line == "DATA":
			inBody = true
			fmt.Fprint(conn, "354 go ahead\r\n")
		case line == "QUIT":
			fmt.Fprint(conn, "221 bye\r\n")
			return
		case strings.HasPrefix(line, "EHLO"):
			fmt.Fprint(conn, "250-relay.example\r\n250 PIPELINING\r\n")
		default:
			inBody = false
			fmt.Fprint(conn, "250 ok\r\n")
		}
	}
}

func TestTimerThatFiresAtTheEndSetsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{Addr: "relay.example:25", TLS: TLSNone})
		if err != nil {
			t.Fatal(err)
		}
		p := c.pool
		p.mu.Lock()
		p.slots.crowded(1, time.Now()) // one of ten connections, and one more after a while
		p.planLocked(time.Now())
		p.mu.Unlock()
		time.Sleep(crowdWait - time.Second)
		c.Close()
		time.Sleep(crowdWait)
		p.wake() // it waited for the lock while the Client was closed
		if p.timer.Stop() {
			t.Error("a timer runs on a closed Client")
		}
	})
}

// endsMeanwhile is a context that ends right after it has reported that it has not.
type endsMeanwhile struct {
	context.Context
	end context.CancelCauseFunc
}

func (c endsMeanwhile) Err() error {
	err := c.Context.Err()
	c.end(fmt.Errorf("a cause of its own"))
	return err
}

func TestContextThatEndsDuringTheCheckHasNotEnded(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	both := endsMeanwhile{ctx, cancel}
	if err := conn.ContextError(both); err != nil {
		t.Errorf("got %v, want no error", err)
	}
	if err := conn.ContextError(both); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "a cause of its own") {
		t.Errorf("got %v, want both errors", err)
	}
}

// The order in which waiters are served, and the cost of leaving.

func TestQueueServesUrgentWaitersFirstExceptEveryEighthTurn(t *testing.T) {
	q := newQueue()
	add := func(n int, a ask) (all []*waiter) {
		for range n {
			w := &waiter{ask: a}
			q.add(w)
			all = append(all, w)
		}
		return all
	}
	others, urgent := add(3, ask{}), add(20, ask{urgent: true})
	again := add(1, ask{again: true})[0]
	others = append([]*waiter{again}, others...) // one that was throttled comes first among its kind
	for turn := range 24 {
		want := &urgent
		if len(urgent) == 0 || turn%othersTurn == othersTurn-1 {
			want = &others
		}
		if w := q.serve(); w != (*want)[0] {
			t.Fatalf("turn %d went to the wrong waiter", turn)
		}
		*want = (*want)[1:]
	}
	if q.len() != 0 || q.next() != nil {
		t.Errorf("%d are left", q.len())
	}
}

func TestAllWaitersAreVisitedEvenIfTheyLeave(t *testing.T) {
	q := newQueue()
	for i := range 10 {
		q.add(&waiter{ask: ask{urgent: i%3 == 0}})
	}
	visited := 0
	q.all(func(w *waiter) {
		visited++
		w.at.Remove()
	})
	if visited != 10 || q.len() != 0 {
		t.Errorf("%d were visited, %d are left", visited, q.len())
	}
}

// BenchmarkCancelWaiting measures a waiter's leaving a queue of 100,000, in random order.
func BenchmarkCancelWaiting(b *testing.B) {
	const waiting = 100_000
	c, err := New(Config{Addr: "relay.example:25", TLS: TLSNone})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	b.ReportAllocs()
	for n := 0; n < b.N; n += waiting {
		b.StopTimer()
		all := make([]*waiter, waiting)
		for i := range all {
			all[i] = &waiter{ctx: ctx}
			c.pool.queue.add(all[i])
		}
		c.pool.waiting.Store(waiting)
		rand.Shuffle(waiting, func(i, j int) { all[i], all[j] = all[j], all[i] })
		b.StartTimer()
		for _, w := range all {
			c.pool.forget(w)
		}
	}
}

func TestTimeForOneOfSeveralAddresses(t *testing.T) {
	for _, tt := range []struct {
		limit, left time.Duration
		addrs       int
		want        time.Duration
	}{
		{30 * time.Second, 29 * time.Second, 1, 29 * time.Second},
		{30 * time.Second, 29 * time.Second, 2, 3 * time.Second},
		{30 * time.Second, 2 * time.Second, 2, time.Second},
		{30 * time.Second, -time.Second, 1, 1},
		{30 * time.Second, 0, 100, 1},
		{0, -time.Second, 1, 0},
		{0, -time.Second, 2, 3 * time.Second},
	} {
		if got := shareOf(tt.limit, tt.left, tt.addrs); got != tt.want {
			t.Errorf("of %v, %v left, %d addresses: %v, want %v", tt.limit, tt.left, tt.addrs, got, tt.want)
		}
	}
}

func TestFaultsOfASingleAddress(t *testing.T) {
	for _, tt := range []struct {
		e    Error
		want bool
	}{
		{Error{Op: OpDial, Err: syscall.ECONNREFUSED}, true},
		{Error{Op: OpDial, Err: fmt.Errorf("socket: %w", syscall.EMFILE)}, false},
		{Error{Op: OpGreeting, Err: errors.New("connection lost")}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 421, Message: "going down"}}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 554, Message: "no"}}, true},
		{Error{Op: OpGreeting, Reply: Reply{Code: 421, Message: "too many connections from you"}}, false},
		{Error{Op: OpEHLO, Reply: Reply{Code: 421, Message: "going down"}}, true},
		{Error{Op: OpTLS, Err: errors.New("handshake")}, true},
		{Error{Op: OpSTARTTLS, Reply: Reply{Code: 454}}, true},
		{Error{Op: OpAuth, Reply: Reply{Code: 535}}, false},
		{Error{Op: OpAuth, Err: errors.New("connection lost")}, false},
		{Error{Op: OpData}, false}, // the probe for refused chunks
	} {
		if got := tt.e.ofNode(); got != tt.want {
			t.Errorf("%v: %v, want %v", &tt.e, got, tt.want)
		}
	}
}
