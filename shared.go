package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// Slots is an allowance of connections that several processes or machines have together; see [Limits].Slots. It is safe for
// concurrent use.
type Slots interface {
	// Acquire waits for a place for one connection, until ctx ends. A Client asks for one at a time. An error counts as a
	// connection that could not be opened; waiting does not.
	Acquire(ctx context.Context) (Slot, error)
}

// Slot is a place for one connection.
type Slot struct {
	// Retire, if not nil, is closed when the connection is to be given up soon, since others wait for a place: it ends with QUIT
	// once it is quiet.
	Retire <-chan struct{}

	// Lost, if not nil, is closed when the place is somebody else's: the connection is closed at once.
	Lost <-chan struct{}

	// Release gives the place back. It is called once, when the relay has closed the connection, or has had Timeouts.Quit to do so,
	// or where there never was one. clean is false where the relay may still count the connection, since it was closed without
	// waiting for that: the place should not be used for a while.
	Release func(clean bool)
}

// errSlotLost ends a connection whose place is somebody else's.
var errSlotLost = errors.New("the place of the connection was lost (Limits.Slots)")

// askLocked asks for a place for one more connection. One is asked for at a time, which is no dial yet: meanwhile others are
// served with what there is.
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

// asked is told what Limits.Slots has answered.
func (p *pool) asked(ctx context.Context, slot Slot, err error) {
	now := time.Now()
	p.mu.Lock()
	cancelled := ctx.Err() != nil
	p.stopAsking = nil
	switch {
	case err != nil && !cancelled:
		p.failedLocked(&Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay, Err: fmt.Errorf("Limits.Slots: %w", err)}, p.gate.round)
	case err != nil:
	case !cancelled && p.mayDialLocked(1, now) && p.slots.take(): // who it was for may have been served meanwhile: one more is of use all the same
		p.dialLocked(context.WithoutCancel(ctx), slot)
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

// watchSlot ends s when its place is wanted or lost, until it is closed.
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
