package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// NoLimit in a field of [Limits], [Timeouts] or [Retry] means no limit, where the field's comment allows that. Any negative value does.
const NoLimit = -1

// Limits are what the relay allows one client. They hold for one [Client] in one process: where several processes share an account,
// divide its allowance among them, or share its connections with Slots. A lower limit that the relay announces (LIMITS, RFC 9422) wins.
type Limits struct {
	_ [0]func() // not comparable, so that it may grow

	// MaxConns is the largest number of open connections. Each counts from before it is dialled until the relay has closed its side.
	// 0 means 10, SendGrid's classic allowance. The range is 1 to 10,000.
	MaxConns int

	// Slots, if not nil, is an allowance of connections that is shared with other processes or machines: the Client acquires a place
	// from it before it dials. MaxConns is in force too. An idle connection keeps its place until MaxIdleTime, or until another
	// process wants it. See [Slots].
	Slots Slots

	// MaxMessagesPerConn is the largest number of messages on a connection before it is replaced; refused messages count.
	// 0 means 100, SendGrid's classic allowance. [NoLimit] means no limit.
	MaxMessagesPerConn int

	// MaxRecipients is the largest number of recipients in one transaction. A message for more recipients is sent in several
	// transactions. 0 means 1,000 (RFC 5321, 4.5.3.1.8 requires relays to take at least 100). [NoLimit] means no limit of the Client's.
	//
	// When a relay refuses recipients with "too many recipients" (452 or 552), the Client remembers how many it took. For ten
	// minutes it puts that many into a transaction, and tries a few more now and then. Neither the default nor a remembered number
	// splits a message with AllOrNothing or one whose Body can be read only once.
	MaxRecipients int

	// MaxWaiting is the maximum number of Sends that wait for a connection. Another Send fails at once with [ErrBusy], and its
	// message is not accepted. SendAll waits instead. 0 means no limit. It must not be negative.
	MaxWaiting int

	// Rate is the maximum number of messages that begin per second, on all connections together.
	//
	// 0 means no limit until the relay replies that messages come too fast (454, 450 and others). The Client then finds out the rate
	// that the relay accepts, and sends the refused messages again at that rate, before all others. A positive Rate is kept from the
	// start and adapts in the same way. With a negative Rate the Client does not adapt: the error of the Send has the relay's reply.
	Rate float64

	// MaxConnAge is the age at which a connection takes no further message, less a random part of up to a tenth, so that many
	// connections are not replaced at the same moment. 0 means 5 minutes. [NoLimit] means no limit.
	MaxConnAge time.Duration

	// MaxIdleTime is how long a connection stays open without a message. 0 means 30 seconds, since some relays close after a minute.
	// [NoLimit] means until the relay closes it.
	MaxIdleTime time.Duration
}

// withDefaults replaces zero by the default, and negative by 0, which means no limit from here on.
func (l Limits) withDefaults() Limits {
	l.MaxConns = orDefault(l.MaxConns, 10)
	l.MaxMessagesPerConn = orDefault(l.MaxMessagesPerConn, 100)
	l.MaxRecipients = orDefault(l.MaxRecipients, 0)
	l.MaxConnAge = orDefault(l.MaxConnAge, 5*time.Minute)
	l.MaxIdleTime = orDefault(l.MaxIdleTime, 30*time.Second)
	return l
}

func orDefault[T int | time.Duration](v, def T) T {
	switch {
	case v == 0:
		return def
	case v < 0:
		return 0
	}
	return v
}

// slots counts open connections against the limit. While the relay replies that there are too many connections, the limit is
// lowered. slots is guarded by the pool's lock.
type slots struct {
	sem  *semaphore.Weighted
	max  int
	open int // acquired for connections
	held int // acquired without a connection, to lower the limit
	owed int // to be held once they are freed

	raiseAfter time.Duration // how long the limit stays lowered before it is raised by one
	raiseAt    time.Time     // when to raise the limit by one; zero means that it is not lowered
	raised     bool          // the limit was raised since it was last lowered
}

const (
	crowdWait     = 30 * time.Second // wait before another connection is tried after "too many connections"; doubles
	crowdWaitMost = 10 * time.Minute
)

func newSlots(max int) *slots {
	return &slots{sem: semaphore.NewWeighted(int64(max)), max: max}
}

// limit returns the current limit.
func (s *slots) limit() int { return s.max - s.held - s.owed }

// take acquires a slot for a connection that is about to be dialled. It returns false if there is none.
func (s *slots) take() bool {
	if !s.sem.TryAcquire(1) {
		return false
	}
	s.open++
	return true
}

// free releases the slot of a connection that the relay has closed, or that was never opened.
func (s *slots) free() {
	if s.open--; s.open < 0 {
		panic("smtprelay: bug: slot freed twice")
	}
	if s.owed > 0 {
		s.owed--
		s.held++
		return
	}
	s.sem.Release(1)
}

// lower reduces the limit to limit, but not below 1.
func (s *slots) lower(limit int) {
	for limit = max(limit, 1); s.limit() > limit; {
		if s.sem.TryAcquire(1) {
			s.held++
		} else {
			s.owed++
		}
	}
}

// raise raises the limit by one and reports whether it is still below the configured limit.
func (s *slots) raise() (lowered bool) {
	switch {
	case s.owed > 0:
		s.owed--
	case s.held > 0:
		s.held--
		s.sem.Release(1)
	}
	return s.held+s.owed > 0
}

// crowded lowers the limit for a while to working, the number of connections that work or are being opened, because the relay
// has replied that there are too many. It returns false if the limit is that low already.
func (s *slots) crowded(working int, now time.Time) bool {
	if s.limit() <= max(working, 1) && !s.raiseAt.IsZero() {
		return false // one of several connections that were refused together
	}
	s.lower(working)
	switch {
	case s.raiseAfter == 0:
		s.raiseAfter = crowdWait
	case s.raised: // the limit was raised too soon
		s.raiseAfter = min(2*s.raiseAfter, crowdWaitMost)
	}
	s.raised = false
	// Add jitter, so that clients that share an allowance do not retry together.
	s.raiseAt = now.Add(s.raiseAfter + rand.N(s.raiseAfter/4))
	return true
}

// raiseDue raises a lowered limit by one if raiseAt has passed.
func (s *slots) raiseDue(now time.Time) {
	if s.raiseAt.IsZero() || now.Before(s.raiseAt) {
		return
	}
	s.raised = true
	if s.raise() {
		s.raiseAt = now.Add(s.raiseAfter)
	} else {
		s.raiseAt, s.raiseAfter = time.Time{}, 0
	}
}

// How long a connection may be idle.

// idleUntilLocked returns when s, which is idle, must end; zero means never.
func (p *pool) idleUntilLocked(s *session) time.Time {
	at := s.Expires()
	if limit := p.cfg.Limits.MaxIdleTime; limit > 0 {
		at = earliest(at, s.idleSince.Add(limit))
	}
	return at
}

// spentLocked reports whether s, which is idle, must end now.
func (p *pool) spentLocked(s *session, now time.Time) bool {
	at := p.idleUntilLocked(s)
	return !at.IsZero() && !now.Before(at)
}

// sweepLocked ends the idle sessions that have expired.
func (p *pool) sweepLocked(now time.Time) {
	if p.idleEnds.IsZero() || now.Before(p.idleEnds) {
		return
	}
	var ends time.Time
	for s := p.idle.First; s != nil; {
		next := s.at.Next
		if p.spentLocked(s, now) {
			if s.Status(now) != conn.Retired { // Status has not retired s by age
				s.Retire(conn.Idle)
			}
			p.settleLocked(s, now)
		} else {
			ends = earliest(ends, p.idleUntilLocked(s))
		}
		s = next
	}
	if soon := now.Add(sweepPause); !ends.IsZero() && ends.Before(soon) {
		ends = soon
	}
	p.idleEnds = ends
	p.planLocked(now)
}

// Slots is an allowance of connections that several processes or machines share; see [Limits]. It must be safe for concurrent use.
type Slots interface {
	// Acquire waits for a place for one connection until ctx ends. A Client makes one call at a time. Meanwhile its other
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

// errSlotLost ends a connection whose place belongs to another process. It is not the relay's fault.
var errSlotLost = &conn.GivenUpError{Err: errors.New("the place of the connection was lost (Limits.Slots)")}

// askLocked acquires a place for another connection in the background. There is one Acquire at a time. Meanwhile open
// connections serve the waiters.
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

// asked handles the result of Slots.Acquire.
func (p *pool) asked(ctx context.Context, slot Slot, err error) {
	now := time.Now()
	p.mu.Lock()
	cancelled := ctx.Err() != nil
	p.stopAsking = nil
	switch {
	case err != nil && !cancelled:
		p.failedLocked(&Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay, Err: fmt.Errorf("Limits.Slots: %w", err)}, p.gate.round, false)
	case err != nil:
	case !cancelled && p.mayDialLocked(1, now) && p.slots.take(): // if its waiter was served meanwhile, the next waiter uses the connection
		p.dialLocked(context.WithoutCancel(ctx), slot, now)
		slot.Release = nil
	}
	p.fillLocked(now)
	p.mu.Unlock()
	if err == nil && slot.Release != nil {
		slot.Release(true)
	}
}

// stopAskingLocked cancels the call of Slots.Acquire in progress, because no further connection is needed.
func (p *pool) stopAskingLocked() {
	if p.stopAsking != nil {
		p.stopAsking()
	}
}

// watchSlot ends s when Slot.Retire or Slot.Lost is closed. It returns when s is closed.
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

// giveBack releases the place of s, if it has one.
func (s *session) giveBack(clean bool) {
	if s.slot.Release == nil {
		return
	}
	close(s.closed)
	s.slot.Release(clean)
}
