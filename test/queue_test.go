// Waiting for a connection: the order, the number that may wait, and messages that do not wait.
package test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// paced is a Client of a relay in memory, limited to 14 messages a second.
func paced(t *testing.T, set func(*smtprelay.Config)) (*smtprelay.Client, *smtptest.Server) {
	relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
	cfg := configOf(relay)
	cfg.Limits.Rate = 14
	if set != nil {
		set(&cfg)
	}
	return newClient(t, cfg), relay
}

func urgent(i int) smtprelay.Message {
	m := numbered(i)
	m.Urgent = true
	return m
}

func TestUrgentMessageOvertakesWaitingMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := paced(t, nil)
		var running sync.WaitGroup
		for i := range 500 {
			running.Go(func() { sendOne(t.Context(), client, i) })
		}
		time.Sleep(5 * time.Second)
		began := time.Now()
		if _, err := client.Send(t.Context(), urgent(1000)); err != nil || time.Since(began) > time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		running.Wait()
	})
}

// Other messages get every eighth turn, however many urgent ones there are.
func TestOthersHaveAnEighthUnderUrgentLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, relay := paced(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for i := range 200 {
			running.Go(func() { sendOne(ctx, client, i) })
		}
		for i := range 300 {
			running.Go(func() {
				for n := 1000 + i; ctx.Err() == nil; n += 1000 {
					client.Send(ctx, urgent(n))
				}
			})
		}
		time.Sleep(30 * time.Second)
		others := 0
		for _, m := range relay.Messages() {
			if len(m.To[0]) <= len("customer999@example.org") {
				others++
			}
		}
		if all := relay.Stats().Accepted; others < all/8-2 || others > all/8+12 {
			t.Errorf("%d of %d were not urgent, want an eighth", others, all)
		}
		cancel()
		running.Wait()
	})
}

// No more than MaxWaiting wait: each further Send fails at once, without using memory.
func TestSendsBeyondMaxWaitingFailAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most, sends = 100, 100_000
		client, relay := paced(t, func(c *smtprelay.Config) { c.Limits.MaxWaiting = most })
		relay.Fault(smtptest.Fault{At: smtptest.Connect, Delay: 10 * time.Second, Count: -1})
		results := make(chan error, most)
		for i := range most {
			go func() { results <- sendOne(t.Context(), client, i).err }() // ends within the test
		}
		synctest.Wait()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		m := numbered(most)
		for range sends {
			_, err := client.Send(t.Context(), m)
			if e := failure(err); !errors.Is(err, smtprelay.ErrBusy) || e.Outcome != smtprelay.NotAccepted || !smtprelay.ShouldRetry(err) {
				t.Fatalf("got %v", err)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 1<<20 {
			t.Errorf("%d octets more are in use", grown)
		}
		for range most {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
	})
}

// SendAll waits where Send would fail because too many wait.
func TestSendAllWaitsBeyondMaxWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, relay := paced(t, func(c *smtprelay.Config) { c.Limits.MaxWaiting = 1 })
		messages := func(yield func(smtprelay.Message) bool) {
			for i := range 100 {
				if !yield(numbered(i)) {
					return
				}
			}
		}
		for r := range client.SendAll(t.Context(), messages) {
			if r.Err != nil {
				t.Error(r.Err)
			}
		}
		want(t, "messages at the relay", relay.Stats().Accepted, 100)
	})
}

// While no dial succeeds, a message with FailFast fails with the last dial's error; it waits for a pool that is merely full.
func TestFailFastReturnsTheLastDialsErrorButWaitsForAFullPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		nobody, dial := refused(relay, 20*time.Second)
		cfg := configOf(relay)
		cfg.Dial = dial
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		fast := func(i int) (time.Duration, error) {
			m := numbered(i)
			m.FailFast = true
			began := time.Now()
			_, err := client.Send(t.Context(), m)
			return time.Since(began), err
		}
		for i := range 50 {
			if took, err := fast(i); !contains(err, "connection refused") || !smtprelay.ShouldRetry(err) || took > 500*time.Millisecond {
				t.Fatalf("while the relay is away: %v after %v", err, took)
			}
			time.Sleep(100 * time.Millisecond)
		}
		atMost(t, "dials in 5 s", len(nobody.dials()), 20)
		time.Sleep(20 * time.Second)
		if _, err := fast(99); err != nil {
			t.Errorf("when the relay is back: %v", err)
		}
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: -1})
		var running sync.WaitGroup
		for i := range 5 {
			running.Go(func() {
				if took, err := fast(100 + i); err != nil {
					t.Errorf("one connection, five messages: %v after %v", err, took)
				}
			})
		}
		running.Wait()
	})
}
