// Transactions that begin before the previous final reply, and relays that do not support that.
package test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Disabling overlap by mistake costs twice the round trips for the Client's lifetime.
func TestOverlapContinuesAfterUnrelatedFailures(t *testing.T) {
	for _, test := range []struct {
		why   string
		leave bool // the relay replies 421 to the RSET after the first final dot
	}{
		{"a caller gives up while the RSET after a final dot has no reply", false},
		{"the relay leaves", true},
	} {
		t.Run(test.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: relaytest.Dial(0, func(n int, l string) string {
					if l == "." || l == "RSET" {
						time.Sleep(time.Second)
					}
					if l == "RSET" && n == 1 && test.leave {
						return "421 4.3.2 shutting down"
					}
					return relaytest.Agree("250 PIPELINING", l)
				})})
				send := func(ctx context.Context) {
					go c.Send(ctx, shortMessage("b@y.example"))
					synctest.Wait()
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				send(t.Context())
				send(ctx)
				if !test.leave {
					time.Sleep(1500 * time.Millisecond)
					cancel()
				}
				time.Sleep(time.Minute)
				before := c.Stats().Overlapped
				for range 3 {
					send(t.Context())
				}
				time.Sleep(time.Minute)
				if n := c.Stats().Overlapped - before; before != 1 || n != 2 {
					t.Errorf("%d of 1 messages overlapped before, and %d of 2 afterwards", before, n)
				}
				c.Close()
				time.Sleep(time.Minute)
			})
		})
	}
}

func TestRelayThatBreaksOverlapIsNoticedByCallersInAHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far, func(s *smtptest.Server) { s.Behind = smtptest.HabitDiscard })
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		failed := 0
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // less than Timeouts.Overlap
			var pair sync.WaitGroup
			var errs atomic.Int64
			for i := range 2 {
				pair.Go(func() {
					if _, err := client.Send(ctx, numbered(i)); err != nil {
						errs.Add(1)
					}
				})
			}
			pair.Wait()
			cancel()
			failed += int(errs.Load())
		}
		atMost(t, "messages that failed", failed, 1)
	})
}
