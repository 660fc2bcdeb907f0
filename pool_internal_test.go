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
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// While a machine sleeps the monotonic clock stands still, and the timer that ends idle connections with it.
func TestConnectionThatHasSleptPastItsIdleTimeIsNotUsed(t *testing.T) {
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
					s.idleSince = s.idleSince.Round(0).Add(-slept) // by the wall clock alone
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

// Slots are taken and freed while the cap goes down and up.
func TestCapIsKeptInWhateverOrderItIsLoweredAndRaised(t *testing.T) {
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

// acceptAll is a relay that says yes to everything.
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

func TestTimerThatRunsOutAtTheEndSetsNoOther(t *testing.T) {
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
		p.wake() // which waited for the lock while the Client was closed
		if p.timer.Stop() {
			t.Error("a timer runs on a closed Client")
		}
	})
}

// endsMeanwhile is a context that ends just when it has said that it has not.
type endsMeanwhile struct {
	context.Context
	end context.CancelCauseFunc
}

func (c endsMeanwhile) Err() error {
	err := c.Context.Err()
	c.end(fmt.Errorf("a cause of its own"))
	return err
}

func TestContextThatEndsMeanwhileHasNotEndedYet(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	both := endsMeanwhile{ctx, cancel}
	if err := conn.ContextError(both); err != nil {
		t.Errorf("got %v, want no error", err)
	}
	if err := conn.ContextError(both); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "a cause of its own") {
		t.Errorf("got %v, want both errors", err)
	}
}

// The order in which those who wait are served, and what it costs to leave.

func TestQueueServesUrgentOnesFirstButForEveryEighthTurn(t *testing.T) {
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
	others = append([]*waiter{again}, others...) // one that was throttled goes before its kind
	for turn := range 24 {
		want := &urgent
		if len(urgent) == 0 || turn%othersTurn == othersTurn-1 {
			want = &others
		}
		if w := q.serve(); w != (*want)[0] {
			t.Fatalf("turn %d went to the wrong one", turn)
		}
		*want = (*want)[1:]
	}
	if q.len() != 0 || q.next() != nil {
		t.Errorf("%d are left", q.len())
	}
}

func TestAllWhoWaitAreVisitedThoughTheyLeave(t *testing.T) {
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

// BenchmarkCancelWaiting is the cost of one that leaves a queue of 100,000, in random order.
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

// The arithmetic of the pace, at times that a test chooses.

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if got < want*0.99 || got > want*1.01 {
		t.Errorf("%s: a pace of %.3f, want %.3f", what, got, want)
	}
}

func TestPaceIsCutOnceForARoundAndRisesAfterwards(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := newPace(0)
	if !p.ready(now) {
		t.Error("no pace, and not ready")
	}
	for i := range 20 {
		p.recent.add(now.Add(time.Duration(i) * 50 * time.Millisecond))
	}
	now = now.Add(time.Second)
	if !p.tooFast(0, now) || p.tooFast(0, now) {
		t.Error("a round cuts once")
	}
	near(t, "what the relay has accepted in the last second", p.rate, 20)
	now = now.Add(2 * time.Second)
	p.rise(now)
	near(t, "two seconds later", p.rate, 20)
	now = now.Add(time.Second)
	p.rise(now)
	near(t, "a second later, while it searches", p.rate, 25)
	p.tooFast(1, now)
	near(t, "cut again", p.rate, 22.5)
	now = now.Add(3 * time.Second)
	p.rise(now)
	near(t, "three seconds later", p.rate, 22.5*paceRise)
	for p.rate <= 25 {
		now = now.Add(time.Second)
		p.rise(now)
	}
	was := p.rate
	now = now.Add(time.Second)
	p.rise(now)
	near(t, "a second later, above the rate that was refused", p.rate, was*paceBeyond)
	now = now.Add(paceMemory)
	p.rise(now)
	if p.rate != 0 || !p.cutAt.IsZero() {
		t.Errorf("after ten minutes there is still a pace of %.2f", p.rate)
	}
}

func TestPaceNeverLeavesItsBounds(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := newPace(14)
	for round := range 200 {
		p.tooFast(round, now)
	}
	near(t, "cut for ever", p.rate, paceLeast)
	for range 3000 {
		now = now.Add(200 * time.Millisecond)
		p.rise(now)
	}
	near(t, "ten minutes later", p.rate, 14)
	off := newPace(-1)
	if off.tooFast(0, now) || !off.ready(now) {
		t.Error("a pace that is off was cut")
	}
}

// Tickets are handed out one at a time: whoever is late does not let those behind him catch up.
func TestPaceMakesUpForNoPause(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := newPace(10)
	begun := 0
	for range 1000 { // a second, each millisecond of it
		if p.ready(now) {
			p.begin(now)
			begun++
		}
		now = now.Add(time.Millisecond)
	}
	if begun < 10 || begun > 11 {
		t.Errorf("%d in the first second", begun)
	}
	now = now.Add(time.Hour)
	begun = 0
	for p.ready(now) {
		p.begin(now)
		begun++
	}
	if begun > 1 {
		t.Errorf("%d at once after a pause", begun)
	}
}
