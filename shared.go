package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// Slots is an allowance of connections that several processes or machines share; see [Limits]. It must be safe for concurrent use.
type Slots interface {
	// Acquire waits for a place for one connection until ctx ends. A Client has one call at a time under way. Meanwhile its other
	// connections go on. An error counts as a connection that could not be opened, and is in the error of a Send that gives up
	// because of it. Waiting counts as no failure; a Send waits up to Timeouts.Outage while nothing gets through.
	Acquire(ctx context.Context) (Slot, error)
}

// Slot is a place for one connection.
type Slot struct {
	// Retire is closed when another process waits for a place. The connection then takes no further message and ends with QUIT. nil
	// means never.
	Retire <-chan struct{}

	// Lost is closed when the place belongs to another process. The connection is then closed at once, in the middle of a message
	// too. nil means never.
	Lost <-chan struct{}

	// Release gives the place back; it is required. The Client calls it once: when the relay has closed the connection or
	// Timeouts.Quit has passed, or when no connection was opened. clean is false if the Client closed the connection without waiting
	// for the relay, which may still count it: the place should not be used for a while.
	Release func(clean bool)
}

// errSlotLost ends a connection whose place belongs to another process. The relay has no part in that.
var errSlotLost = &conn.GivenUpError{Err: errors.New("the place of the connection was lost (Limits.Slots)")}

// askLocked acquires a place for one more connection in the background. Only one is asked for at a time. Meanwhile waiters are served
// with the connections that are open.
func (p *pool) askLocked() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(p.queue.next().ctx))
	stop := context.AfterFunc(p.closing, cancel)
	p.stopAsking = cancel
	p.running.Go(func() {
		defer cancel()
		defer stop()
		slot, err := p.cfg.Limits.Slots.Acquire(ctx)
		if err == nil && slot.Release == nil {
			err = errors.New("a Slot without Release")
		}
		p.asked(ctx, slot, err)
	})
}

// asked takes the answer of Limits.Slots.
func (p *pool) asked(ctx context.Context, slot Slot, err error) {
	now := time.Now()
	p.mu.Lock()
	cancelled := ctx.Err() != nil
	p.stopAsking = nil
	switch {
	case err != nil && !cancelled:
		p.failedLocked(&Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay, Err: fmt.Errorf("Limits.Slots: %w", err)}, p.gate.round, false)
	case err != nil:
	case !cancelled && p.mayDialLocked(1, now) && p.slots.take(): // the waiter that it was for may be served by now; the next one uses it
		p.dialLocked(context.WithoutCancel(ctx), slot, now)
		slot.Release = nil
	}
	p.fillLocked(now)
	p.mu.Unlock()
	if err == nil && slot.Release != nil {
		slot.Release(true)
	}
}

// stopAskingLocked ends the wait for a place: there are sessions to spare.
func (p *pool) stopAskingLocked() {
	if p.stopAsking != nil {
		p.stopAsking()
	}
}

// watchSlot ends s when its place is wanted or lost. It returns when s is closed.
func (p *pool) watchSlot(s *session) {
	retire := s.slot.Retire
	for {
		select {
		case <-retire:
			retire = nil
			s.Retire(conn.Shared)
			p.mu.Lock()
			p.settleLocked(s, time.Now())
			p.mu.Unlock()
		case <-s.slot.Lost:
			s.Kill(errSlotLost)
			return
		case <-s.closed:
			return
		}
	}
}

// giveBack gives back the place of s, if it has one.
func (s *session) giveBack(clean bool) {
	if s.slot.Release == nil {
		return
	}
	close(s.closed)
	s.slot.Release(clean)
}
