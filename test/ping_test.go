// What Ping reports about a client: busy, idle, slow, misconfigured or without a relay.
package test

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// pingWithin is a readiness probe.
func pingWithin(t *testing.T, client *smtprelay.Client, limit time.Duration) (time.Duration, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	began := time.Now()
	err := client.Ping(ctx)
	return time.Since(began), err
}

func TestPingOfABusyClientIsAnsweredAtOnce(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.Accepted, Delay: 5 * time.Second, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 2
		client := newClient(t, cfg)
		var senders sync.WaitGroup
		for i := range 40 {
			senders.Go(func() {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(6 * time.Second)
		for range 5 {
			if s := client.Stats(); s.Waiting == 0 {
				t.Fatal("no Send waits: the client is not busy")
			}
			if took, err := pingWithin(t, client, time.Second); err != nil || took != 0 {
				t.Errorf("got %v after %v, want nil at once", err, took)
			}
			time.Sleep(7 * time.Second)
		}
		senders.Wait()
		want(t, "connections", len(relay.Conns()), 2)
	})
}

// Success half a minute ago proves nothing if the relay has been silent since.
func TestPingFailsOnceTheRelayHasBeenSilentForHalfAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		cfg := configOf(relay)
		cfg.Limits.MaxConns, cfg.Pipelining = 1, smtprelay.PipelineWithin
		client := newClient(t, cfg)
		if _, err := client.Send(t.Context(), numbered(0)); err != nil {
			t.Fatal(err)
		}
		silent := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Stall: true})
		ended := make(chan error, 1)
		go func() { // ends when the fault is removed
			_, err := client.Send(t.Context(), numbered(1))
			ended <- err
		}()
		if err := silent.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * time.Second)
		if _, err := pingWithin(t, client, time.Second); err != nil {
			t.Errorf("after 29 s: %v", err)
		}
		time.Sleep(2 * time.Second)
		if took, err := pingWithin(t, client, time.Second); !errors.Is(err, context.DeadlineExceeded) || took != time.Second {
			t.Errorf("after 31 s: got %v after %v, want the context's error after a second", err, took)
		}
		silent.Remove()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if took, err := pingWithin(t, client, time.Second); err != nil || took != 0 {
			t.Errorf("the relay works again: got %v after %v", err, took)
		}
	})
}

func TestPingOfAnIdleClientCostsNoTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		client := newClient(t, configOf(relay))
		for range 10 {
			if _, err := pingWithin(t, client, time.Second); err != nil {
				t.Error(err)
			}
			time.Sleep(2 * time.Second)
		}
		want(t, "connections", len(relay.Conns()), 1)
		want(t, "AUTH", commands(relay, "AUTH"), 1)
		want(t, "NOOP", commands(relay, "NOOP"), 0)
	})
}

func TestPingDoesNotTrustAConnectionThatWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		client := newClient(t, configOf(relay))
		if _, err := client.Send(t.Context(), numbered(0)); err != nil {
			t.Fatal(err)
		}
		relay.Close()
		synctest.Wait()
		if took, err := pingWithin(t, client, time.Minute); err == nil {
			t.Errorf("got nil after %v, but there is no relay", took)
		}
	})
}

func TestPingSaysAtOnceThatThereIsNoRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var nobody noRelay
		client := newClient(t, nobody.config())
		took, err := pingWithin(t, client, time.Minute)
		if !errors.Is(err, syscall.ECONNREFUSED) || took != 0 {
			t.Errorf("got %v after %v, want the refusal at once", err, took)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := client.Ping(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want the context's error", err)
		}
	})
}
