// Limits.Slots: an allowance of connections that several Clients share.
package test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// allowance is a number of slots for all that share it.
type allowance struct {
	places chan struct{}

	mu      sync.Mutex
	err     error           // returned by Acquire while set
	asking  int             // calls of Acquire in progress
	most    int             // maximum of asking
	taken   []chan struct{} // Retire of each slot, oldest first
	lost    []chan struct{} // and Lost
	open    func() int      // if set, returns the connections that the relay counts; called when a slot is released
	counted []int
	dirty   int // slots released with clean unset
}

func newAllowance(n int) *allowance { return &allowance{places: make(chan struct{}, n)} }

func (a *allowance) Acquire(ctx context.Context) (smtprelay.Slot, error) {
	a.mu.Lock()
	err := a.err
	a.asking++
	a.most = max(a.most, a.asking)
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.asking--
	}()
	if err != nil {
		return smtprelay.Slot{}, err
	}
	select {
	case a.places <- struct{}{}:
	case <-ctx.Done():
		return smtprelay.Slot{}, ctx.Err()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	retire, lost := make(chan struct{}), make(chan struct{})
	a.taken, a.lost = append(a.taken, retire), append(a.lost, lost)
	return smtprelay.Slot{Retire: retire, Lost: lost, Release: func(clean bool) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.open != nil {
			a.counted = append(a.counted, a.open())
		}
		if !clean {
			a.dirty++
		}
		<-a.places
	}}, nil
}

// asked returns how many wait for a slot, and the most that did at once.
func (a *allowance) asked() (now, most int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asking, a.most
}

// sharing is a Client that opens connections with slots of a.
func sharing(t *testing.T, relay *smtptest.Server, a smtprelay.Slots) *smtprelay.Client {
	cfg := configOf(relay)
	cfg.Limits.Slots = a
	return newClient(t, cfg)
}

func TestClientsThatShareSlotsAreNeverRefused(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxConns, s.Delay = 3, 20*time.Millisecond })
		shared := newAllowance(3)
		var senders sync.WaitGroup
		var clients []*smtprelay.Client
		for range 3 {
			cfg := configOf(relay)
			cfg.Limits.Slots, cfg.Limits.MaxMessagesPerConn = shared, 30 // connections come and go
			client := newClient(t, cfg)
			clients = append(clients, client)
			senders.Go(func() { sendNumbered(t, client, 100, 10) })
		}
		senders.Wait()
		stats := relay.Stats()
		want(t, "accepted", stats.Accepted, 300)
		want(t, "refused", stats.Refused, 0)
		atMost(t, "open at once", stats.MaxOpen, 3)
		for _, c := range clients {
			c.Close()
		}
		want(t, "slots in use at the end", len(shared.places), 0)
	})
}

func TestOneSlotIsAcquiredAtATimeAndMessagesOverlapMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		shared := newAllowance(1)
		client := sharing(t, relay, shared)
		sendNumbered(t, client, 90, 20)
		stats := relay.Stats()
		want(t, "connections", stats.Conns, 1)
		_, most := shared.asked()
		want(t, "calls of Acquire at once", most, 1)
		atMost(t, "round trips for messages", stats.MessageTurns, 91)
		client.Close()
		want(t, "slots in use at the end", len(shared.places), 0)
	})
}

func TestWaitForASlotEndsWhenNoMessageNeedsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		shared := newAllowance(1)
		client := sharing(t, relay, shared)
		sendNumbered(t, client, 30, 10)
		synctest.Wait()
		asking, _ := shared.asked()
		want(t, "calls of Acquire in progress", asking, 0)
		want(t, "idle", client.Stats().IdleConns, 1)
	})
}

func TestSlotsThatFailCountAsAnUnreachableRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		shared := newAllowance(1)
		shared.err = errors.New("the store of leases is away")
		client := sharing(t, relay, shared)
		m := numbered(1)
		m.FailFast = true
		_, err := client.Send(t.Context(), m)
		if e, ok := errors.AsType[*smtprelay.Error](err); !ok || !errors.Is(err, shared.err) || e.Scope != smtprelay.ScopeRelay || !smtprelay.ShouldRetry(err) {
			t.Errorf("got %v, want the error of Slots, about the relay", err)
		}
		want(t, "connections", relay.Stats().Conns, 0)

		go func() {
			time.Sleep(10 * time.Second)
			shared.mu.Lock()
			defer shared.mu.Unlock()
			shared.err = nil
		}()
		if _, err := client.Send(t.Context(), numbered(2)); err != nil {
			t.Errorf("once there are slots: %v", err)
		}
	})
}

func TestErrorSaysThatAllSlotsAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		client := sharing(t, relay, newAllowance(0))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := client.Send(ctx, numbered(1))
		if want := "smtprelay: waiting for a connection: context deadline exceeded; other processes hold all places of Limits.Slots"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	})
}

func TestRetiredSlotIsReleasedOnceTheRelayHasClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		shared := newAllowance(1)
		shared.open = func() int { return relay.Stats().Open }
		var reasons []string
		cfg := configOf(relay)
		cfg.Limits.Slots = shared
		cfg.Trace = &smtprelay.Trace{ConnClosed: func(_ context.Context, i smtprelay.ConnClosedInfo) { reasons = append(reasons, i.Reason) }}
		client := newClient(t, cfg)
		sendNumbered(t, client, 1, 1)
		close(shared.taken[0])
		time.Sleep(time.Second)
		synctest.Wait()
		if !slices.Equal(shared.counted, []int{0}) || !slices.Equal(reasons, []string{"shared"}) {
			t.Errorf("the relay counted %v connections when a slot was released, whose connection ended because of %v", shared.counted, reasons)
		}
		want(t, "not clean", shared.dirty, 0)
		sendNumbered(t, client, 1, 1)
		want(t, "connections", relay.Stats().Conns, 2)
	})
}

func TestLostSlotClosesItsConnectionAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		shared := newAllowance(1)
		client := sharing(t, relay, shared)
		sendNumbered(t, client, 1, 1)
		close(shared.lost[0])
		synctest.Wait()
		want(t, "open", client.Stats().OpenConns, 0)
		want(t, "not clean", shared.dirty, 1)
	})
}

func TestSlotOfAConnectionThatCannotBeOpenedIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 not now", Drop: true, Count: 3})
		shared := newAllowance(1)
		client := sharing(t, relay, shared)
		sendNumbered(t, client, 1, 1)
		want(t, "connections", relay.Stats().Conns, 4)
		want(t, "places taken", len(shared.places), 1)
		want(t, "not clean", shared.dirty, 0)
	})
}
