// The Registry: which Sends share a Client, and when a Client is shut down.
package test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// tenant returns a relay in memory and the Config by which a Registry finds it.
func tenant(t *testing.T, name string) (*smtptest.Server, smtprelay.Config) {
	t.Helper()
	relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
	cfg := relay.Config()
	cfg.Name = name
	cfg.Limits.MaxIdleTime = time.Hour
	return relay, cfg
}

func TestSendsWithOneConfigShareAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay, cfg := tenant(t, "shop")
		cfg.Limits.MaxConns = 3
		var r smtprelay.Registry
		var senders sync.WaitGroup
		for i := range 60 {
			senders.Go(func() {
				if _, err := r.Send(t.Context(), cfg, numbered(i)); err != nil {
					t.Error(err)
				}
			})
		}
		senders.Wait()
		want(t, "messages", len(relay.Messages()), 60)
		atMost(t, "connections", len(relay.Conns()), 3)
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		want(t, "open connections", relay.Stats().Open, 0)
		if _, err := r.Send(t.Context(), cfg, numbered(61)); !errors.Is(err, smtprelay.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
	})
}

func TestLeastRecentlyUsedClientIsShutDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := smtprelay.Registry{Max: 2}
		var relays []*smtptest.Server
		var cfgs []smtprelay.Config
		for i := range 3 {
			relay, cfg := tenant(t, fmt.Sprint("tenant", i))
			relays, cfgs = append(relays, relay), append(cfgs, cfg)
		}
		send := func(i int) {
			t.Helper()
			if _, err := r.Send(t.Context(), cfgs[i], numbered(i)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		for _, i := range []int{0, 1, 0, 2} {
			send(i)
		}
		for i, n := range []int{1, 0, 1} {
			want(t, fmt.Sprint("open connections of ", i), relays[i].Stats().Open, n)
		}
		want(t, "ends with QUIT", relays[1].Conns()[0].Commands["QUIT"], 1)
		send(1)
		want(t, "connections of one that came back", len(relays[1].Conns()), 2)
		want(t, "open connections of 0", relays[0].Stats().Open, 0)
		r.Shutdown(t.Context())
	})
}

func TestClientIsNotShutDownDuringASend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := smtprelay.Registry{Max: 1}
		slow, slowCfg := tenant(t, "slow")
		slow.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Minute})
		quick, quickCfg := tenant(t, "quick")
		var sending sync.WaitGroup
		sending.Go(func() {
			if _, err := r.Send(t.Context(), slowCfg, numbered(1)); err != nil {
				t.Errorf("the Send in progress: %v", err)
			}
		})
		time.Sleep(time.Second)
		if _, err := r.Send(t.Context(), quickCfg, numbered(2)); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		want(t, "open connections of the one that is kept", slow.Stats().Open, 1)
		want(t, "open connections of the other", quick.Stats().Open, 0)
		sending.Wait()
		want(t, "messages of the one that was kept", len(slow.Messages()), 1)
		r.Shutdown(t.Context())
	})
}

// The relay counts the connections of the old Client and of the new one.
func TestNextClientOfTheSameConfigWaitsForTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := smtprelay.Registry{Max: 1}
		relay, cfg := tenant(t, "a")
		cfg.Limits.MaxConns = 1
		relay.Fault(smtptest.Fault{At: smtptest.Quit, Delay: 2 * time.Second})
		_, other := tenant(t, "b")
		for _, c := range []smtprelay.Config{cfg, other, cfg, other, cfg} {
			if _, err := r.Send(t.Context(), c, numbered(1)); err != nil {
				t.Fatal(err)
			}
		}
		want(t, "most connections open at once", relay.Stats().MaxOpen, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for _, c := range []smtprelay.Config{other, cfg} {
			if _, err := r.Send(ctx, c, numbered(1)); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want the context's error", err)
			}
		}
		r.Shutdown(t.Context())
	})
}

func TestRegistryReportsTheMistakesOfAConfig(t *testing.T) {
	var r smtprelay.Registry
	for why, cfg := range map[string]smtprelay.Config{
		"a mistake":                     {Addr: "nowhere"},
		"funcs that cannot be compared": {Addr: "relay.example:25", Trace: &smtprelay.Trace{}},
	} {
		_, err := r.Send(t.Context(), cfg, numbered(1))
		if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpConfig || e.Outcome != smtprelay.NotAccepted {
			t.Errorf("%s: got %v, want an error of the configuration", why, err)
		}
	}
	if err := r.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}
