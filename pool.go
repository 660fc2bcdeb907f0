package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// pool keeps the sessions of a Client and hands them out, first come first served. When to open one is in open.go.
//
// One count, one lock, one function that frees: each open connection holds a slot from before it is dialled until the
// relay has closed it. Whatever a waiter may be served with (a session given back, one that may be overlapped, a finished
// dial) goes to the oldest one. Nothing on a message's way searches a list: a message costs the same with 10 connections and
// with 10,000.
type pool struct {
	cfg     *settings
	waiting atomic.Int32    // queue.len, for those who only want a hint
	sends   atomic.Int64    // calls under way
	closed  atomic.Bool     // Shutdown or Close was called: no call begins any more
	left    chan struct{}   // closed when closed is set and the last call has ended
	allLeft func()          // closes it; may be called again
	closing context.Context // ends with Close: dials in progress are given up
	cancel  context.CancelFunc
	running sync.WaitGroup // of all goroutines of the Client
	spare   sync.Pool      // *waiter; the Client's own, since a channel must not cross the bubbles of testing/synctest

	mu         sync.Mutex // guards the fields below; never held across I/O or a callback
	slots      *slots
	gate       gate
	sessions   map[*session]struct{}
	idle       list[session] // free; the one used last is at the end
	ready      list[session] // may be overlapped; the one that has waited longest is first
	queue      queue
	pace       pace
	stopAsking func() // ends the wait for a place of Limits.Slots; nil while none is asked for
	dialling   int
	dials      list[session] // of these, the ones that are not slow yet, oldest first
	slow       int           // the others, which nobody counts on
	greeted    int           // of these, how many the relay has greeted
	crowdRound int           // the round of the gate, plus one, in which a dial was refused as one too many and no other had got further; 0: none
	lastID     int64
	usedUp     int           // sessions that were full when they ended, since one was last idle
	lastRoom   int           // the sum of session.lastRoom
	trustUntil time.Time     // when lastRoom is counted anew, if somebody waits; zero means that nobody has waited
	through    time.Time     // when the relay did its work last, as far as was looked
	outageAt   time.Time     // when to look for those who have waited for too long; zero means that nobody waits
	idleEnds   time.Time     // no idle session ends before; zero means that none ends
	timer      *time.Timer   // calls wake; nil until there is a need
	wakeAt     time.Time     // when it runs out; zero means that it does not run
	draining   bool          // nothing is handed out any more
	ending     chan struct{} // closed when draining is set
	empty      chan struct{} // closed when draining and no slot is in use
}

// session is an open connection and what the pool knows of it.
type session struct {
	*conn.Conn
	id       int64
	pool     *pool
	round    int                 // of the dial gate, when this one was dialled, and from then on when it was open
	sendAway func()              // Conn.SendAway, in a goroutine of the pool's
	node     netip.AddrPort      // of several addresses, the one tried last; owned by the dial, as is remote
	remote   string              // the address that it was dialled at, as far as is known
	slot     Slot                // of Limits.Slots; its Release is nil where there is none
	closed   chan struct{}       // closed before slot is given back
	domains  map[string]struct{} // of recipients so far, if the relay limits their number; owned by the holder of the write side

	// Guarded by the pool's lock.
	held      bool           // somebody has the write side
	gone      bool           // the relay has closed it
	at        links[session] // in idle or ready, while nobody holds it; in dials before
	dialled   time.Time      // when the dial was begun
	idleSince time.Time
	greeted   bool // by the relay, while it is being opened
	lostIdle  bool // it was lost while it was idle
	lastRoom  int  // transactions left, where it is near its last; see pool.roomLocked
}

// Wanted implements [conn.Owner].
func (s *session) Wanted() bool { return s.pool.waiting.Load() > 0 }

// Handoff implements [conn.Owner].
func (s *session) Handoff() bool { return s.pool.handoff(s) }

// Release implements [conn.Owner].
func (s *session) Release() { s.pool.release(s) }

// Greeted implements [conn.Owner].
func (s *session) Greeted() { s.pool.hasGreeted(s) }

// SendAway implements [conn.Owner].
func (s *session) SendAway() bool { return s.pool.startSendAway(s) }

// Changed implements [conn.Owner].
func (s *session) Changed(answered bool) { s.pool.changed(s, answered) }

// Elsewhere implements [conn.Owner].
func (s *session) Elsewhere() bool { return s.pool.elsewhere() }

// Closed implements [conn.Owner].
func (s *session) Closed() { s.pool.sessionClosed(s) }

func newPool(cfg *settings) *pool {
	place := func(s *session) *links[session] { return &s.at }
	p := &pool{
		cfg:      cfg,
		slots:    newSlots(cfg.Limits.MaxConns),
		sessions: make(map[*session]struct{}),
		idle:     list[session]{links: place},
		ready:    list[session]{links: place},
		dials:    list[session]{links: place},
		queue:    newQueue(),
		pace:     newPace(cfg.Limits.Rate),
		left:     make(chan struct{}),
		ending:   make(chan struct{}),
		empty:    make(chan struct{}),
	}
	p.allLeft = sync.OnceFunc(func() { close(p.left) })
	p.spare.New = func() any { return &waiter{served: make(chan struct{}, 1)} }
	p.closing, p.cancel = context.WithCancel(context.Background())
	return p
}

func errClosed() *Error {
	return &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: ErrClosed, permanent: true}
}

// enter begins a call, which leave ends. Once the Client is closed there are no more.
func (p *pool) enter() *Error {
	p.sends.Add(1)
	if p.closed.Load() {
		p.leave()
		return errClosed()
	}
	return nil
}

func (p *pool) leave() {
	if p.sends.Add(-1) == 0 && p.closed.Load() {
		p.allLeft()
	}
}

// take waits for a session and hands out its write side.
func (p *pool) take(ctx context.Context, want ask) (grant, *Error) {
	began := time.Now()
	p.mu.Lock()
	g, err := p.takeLocked(ctx, want, began)
	if g.session != nil || err != nil {
		p.mu.Unlock()
		if err == nil {
			p.traceGot(ctx, g.session, 0)
		}
		return g, err
	}
	w := p.spare.Get().(*waiter)
	*w = waiter{ask: want, ctx: ctx, since: began.Add(-want.waited), served: w.served}
	p.queue.add(w)
	p.expectOutageLocked(w)
	p.waiting.Add(1)
	p.fillLocked(began)
	p.mu.Unlock()

	select {
	case <-w.served:
	case <-ctx.Done():
		if err := p.forget(w); err != nil {
			p.cfg.stats.waitedSince(began)
			g.failed = w.failed
			p.spare.Put(w)
			return g, err
		}
		<-w.served // with a session, which may carry somebody's final dot: its transaction sees to that
	}
	p.cfg.stats.waitedSince(began)
	g, err = w.grant, w.err
	g.waited = time.Since(began)
	*w = waiter{served: w.served}
	p.spare.Put(w)
	if err == nil {
		p.traceGot(ctx, g.session, time.Since(began))
	}
	return g, err
}

// ErrBusy is found by errors.Is in the error of a Send for which there was no room in the queue; see [Limits.MaxWaiting].
// [ShouldRetry] is true for it.
var ErrBusy = errors.New("too many messages wait already (Limits.MaxWaiting)")

// takeLocked returns a session, or an error, if there is one for somebody who comes now.
func (p *pool) takeLocked(ctx context.Context, want ask, now time.Time) (grant, *Error) {
	if p.draining {
		return grant{}, errClosed()
	}
	if err := conn.ContextError(ctx); err != nil {
		return grant{}, &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: err}
	}
	if p.queue.len() == 0 && p.pace.ready(now) {
		if s := p.freeLocked(1, now); s != nil {
			return p.grantLocked(s, now), nil
		}
	}
	if err := p.refusalLocked(want, now); err != nil {
		return grant{}, err
	}
	if most := p.cfg.Limits.MaxWaiting; most > 0 && p.queue.len() >= most && !want.admitted && !want.patient {
		return grant{}, &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: ErrBusy}
	}
	return grant{}, nil
}

// refusalLocked is what to tell at once to somebody who needs a new connection: the credentials are known to be wrong, or no
// connection can be had and he would rather know. It is nil if he is to wait.
func (p *pool) refusalLocked(want ask, now time.Time) *Error {
	e := p.gate.refusal(now)
	if e == nil && want.failFast && p.gate.failures > 0 && !p.gate.open(now, p.dialling) {
		e = p.gate.last.clone()
	}
	if e == nil || p.workingLocked() {
		return nil
	}
	return e
}

// freeLocked returns a session for one message: an idle one or, if no connection would be opened for so many more than wait,
// one to overlap on; nil if there is none.
func (p *pool) freeLocked(more int, now time.Time) *session {
	for s := p.idle.last; s != nil; s = p.idle.last {
		s.at.remove()
		if p.spentLocked(s, now.Round(0)) {
			s.Retire(conn.Idle) // the timer goes by the monotonic clock, which stands still while a machine sleeps
		}
		if s.Status(now) == conn.Free {
			return s
		}
		p.settleLocked(s, now) // too old, or dead
	}
	if p.mayDialLocked(more, now) {
		return nil
	}
	return p.overlapLocked(now)
}

// overlapLocked returns a session that may be overlapped, nil if there is none.
func (p *pool) overlapLocked(now time.Time) *session {
	for s := p.ready.first; s != nil; s = p.ready.first {
		s.at.remove()
		if st := s.Status(now); st == conn.Overlappable || st == conn.Free {
			return s
		}
	}
	return nil
}

// forget takes w out of the queue and returns the reason to tell; nil means that it has been served.
func (p *pool) forget(w *waiter) *Error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.at.in == nil {
		return nil
	}
	p.leaveLocked(w)
	scope := ScopeCaller
	if p.gate.last != nil {
		scope = ScopeRelay
	}
	return &Error{Op: OpWait, Outcome: NotAccepted, Scope: scope, Err: p.explainLocked(conn.ContextError(w.ctx))}
}

// leaveLocked takes w out of the queue.
func (p *pool) leaveLocked(w *waiter) {
	w.at.remove()
	p.waiting.Add(-1)
}

// explainLocked adds to err, with which a wait has ended, why there was no connection: how the last one failed, or else
// the step that the one being opened has come to.
func (p *pool) explainLocked(err error) error {
	if last := p.gate.last; last != nil {
		return fmt.Errorf("%w; the last connection tried: %v", err, strings.TrimPrefix(last.Error(), "smtprelay: "))
	}
	if p.stopAsking != nil {
		return fmt.Errorf("%w; others have all the places of Limits.Slots", err)
	}
	op, known := p.cfg.opening.Load().(Op)
	if p.dialling == 0 || !known {
		return err
	}
	err = fmt.Errorf("%w; a connection to %s is being opened and has come to: %s", err, p.cfg.Addr, op.Text())
	if op == OpGreeting && !p.cfg.implicit() {
		err = fmt.Errorf("%w; %s", err, p.cfg.silenceHint())
	}
	return err
}

// release takes the write side of s back. What is still in the buffer is another transaction's final dot: it leaves with the envelope of
// a waiter who can go on with s at once, else now, in a goroutine that ends when it has, since a relay that reads nothing
// must not hold up a Send that has nothing to do with it.
func (p *pool) release(s *session) {
	if s.Buffered() && p.handoff(s) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.gone {
		return
	}
	if s.Buffered() {
		p.running.Go(func() {
			s.Flush()
			p.mu.Lock()
			defer p.mu.Unlock()
			p.releaseLocked(s)
		})
		return
	}
	p.releaseLocked(s)
}

// startSendAway has what is in the buffer of s leave, and reports false where s is gone.
func (p *pool) startSendAway(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.gone {
		return false
	}
	p.running.Add(1)
	go s.sendAway() // as it is: anything around it would be allocated, for one message in two
	return true
}

// releaseLocked takes the write side of s back.
func (p *pool) releaseLocked(s *session) {
	s.held = false
	p.settleLocked(s, time.Now())
}

// handoff gives the write side of s to one who waits and can go on at once, and reports whether there is one.
func (p *pool) handoff(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.queue.len() == 0 || p.draining || s.gone || !p.pace.ready(now) {
		return false
	}
	if st := s.Status(now); st != conn.Overlappable && st != conn.Free {
		return false
	}
	p.serveLocked(s, now)
	return true
}

// changed is told by a session that a final reply is in, or that it is over.
func (p *pool) changed(s *session, answered bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if answered && s.Info().Decided {
		p.through = now
	}
	p.settleLocked(s, now)
}

// elsewhere reports whether one more message would get a session at once.
func (p *pool) elsewhere() bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle.len > 0 || p.cfg.Limits.Slots == nil && p.mayDialLocked(1, now)
}

// settleLocked puts s where its state says, if nobody holds it: to the oldest waiter, to the idle ones, to those that may
// be overlapped, or on its way out.
func (p *pool) settleLocked(s *session, now time.Time) {
	if s.gone || s.held {
		return
	}
	wasIdle := s.at.in == &p.idle
	s.at.remove()
	p.roomLocked(s, s.LastRoom(now.Add(-endingTrust)))
	if p.gate.failures > 0 && s.round == p.gate.round && s.Info().Decided { // opened since the last failure
		p.gate.opened()
		defer p.fillLocked(now)
	}
	st := s.Status(now)
	switch {
	case st == conn.Retired:
		p.quitLocked(s)
	case st == conn.Free && p.draining:
		s.Retire(conn.Closed)
		p.quitLocked(s)
	case st == conn.Lost:
		s.lostIdle = wasIdle
	case st == conn.Busy, p.draining:
	case p.queue.len() > 0 && p.pace.ready(now):
		p.serveLocked(s, now)
	case st == conn.Free:
		p.idleLocked(s, now)
	default:
		p.ready.pushBack(s)
	}
}

// grantLocked gives the write side of s, which is in no list, to somebody for one message.
func (p *pool) grantLocked(s *session, now time.Time) grant {
	s.held = true
	p.roomLocked(s, s.LastRoom(now.Add(-endingTrust))-1)
	p.pace.begin(now)
	return grant{session: s, round: p.pace.round}
}

// serveLocked gives s to the one whose turn it is.
func (p *pool) serveLocked(s *session, now time.Time) {
	w := p.queue.serve()
	p.waiting.Add(-1)
	failed := w.failed
	w.grant = p.grantLocked(s, now)
	w.failed = failed
	w.served <- struct{}{}
}

// failLocked tells e to w, who waits.
func (p *pool) failLocked(w *waiter, e *Error) {
	p.leaveLocked(w)
	w.err = e.clone()
	w.served <- struct{}{}
}

// quitLocked says QUIT on s, in a goroutine that ends when that is written. Nobody gets s any more.
func (p *pool) quitLocked(s *session) {
	s.held = true
	p.running.Go(s.Quit)
}

// The timer.

// wake does what is due although nothing has happened, and has others overlap or open connections.
func (p *pool) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeAt = time.Time{}
	if p.draining {
		return // the timer ran out as it was stopped, and no other may follow it
	}
	now := time.Now()
	p.slots.raiseDue(now)
	p.sweepLocked(now)
	p.countRoomLocked(now)
	p.slowDialsLocked(now)
	p.endOutageLocked(now)
	p.fillLocked(now)
}

// nextWakeLocked is when something is due although nothing happens; zero means never.
func (p *pool) nextWakeLocked(now time.Time) time.Time {
	at := earliest(p.slots.raiseAt, p.idleEnds)
	if p.queue.len() == 0 {
		return at
	}
	at = earliest(at, p.trustUntil)
	at = earliest(at, p.outageAt)
	if p.dials.first != nil {
		at = earliest(at, p.dials.first.dialled.Add(slowDial))
	}
	for _, t := range []time.Time{p.gate.opens(), p.pace.next} {
		if t.After(now) {
			at = earliest(at, t)
		}
	}
	return at
}

// earliest returns the earlier of two times; zero means never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// planLocked has wake called in time. It is called whenever nextWakeLocked may have come nearer.
func (p *pool) planLocked(now time.Time) {
	at := p.nextWakeLocked(now)
	if p.draining || at.IsZero() || !p.wakeAt.IsZero() && !at.Before(p.wakeAt) {
		return
	}
	p.wakeAt = at
	if p.timer == nil {
		p.timer = time.AfterFunc(at.Sub(now), p.wake)
	} else {
		p.timer.Reset(at.Sub(now))
	}
}

// Idle sessions.

// sweepPause is how long idle sessions are left alone after a look at all of them.
const sweepPause = 50 * time.Millisecond

// idleLocked puts s, which is free, to the idle ones.
func (p *pool) idleLocked(s *session, now time.Time) {
	s.idleSince = now
	p.idle.pushBack(s)
	p.usedUp = 0
	p.stopAskingLocked()
	p.idleEnds = earliest(p.idleEnds, p.idleUntilLocked(s))
	p.planLocked(now)
}

// idleUntilLocked is when s, which is idle, must end; zero means never.
func (p *pool) idleUntilLocked(s *session) time.Time {
	at := s.Expires()
	if limit := p.cfg.Limits.MaxIdleTime; limit > 0 {
		at = earliest(at, s.idleSince.Add(limit))
	}
	return at
}

// spentLocked reports whether the time of s, which is idle, has come.
func (p *pool) spentLocked(s *session, now time.Time) bool {
	at := p.idleUntilLocked(s)
	return !at.IsZero() && !now.Before(at)
}

// sweepLocked ends the idle sessions whose time has come.
func (p *pool) sweepLocked(now time.Time) {
	if p.idleEnds.IsZero() || now.Before(p.idleEnds) {
		return
	}
	var ends time.Time
	for s := p.idle.first; s != nil; {
		next := s.at.next
		if p.spentLocked(s, now) {
			if s.Status(now) != conn.Retired { // not by age
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

// Ending.

// drain lets nothing more be taken: waiters are told, sessions end with QUIT once they are quiet.
func (p *pool) drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.draining {
		return
	}
	p.draining = true
	close(p.ending)
	p.stopAskingLocked()
	p.failAllLocked(errClosed())
	if p.timer != nil {
		p.timer.Stop()
	}
	now := time.Now()
	for s := range p.sessions {
		p.settleLocked(s, now)
	}
	if p.slots.open == 0 {
		close(p.empty)
	}
}

// shutdown lets the calls that have begun come to their end, and then ends everything; at the end of ctx in any case.
func (p *pool) shutdown(ctx context.Context) error {
	p.closed.Store(true)
	if p.sends.Load() == 0 {
		p.allLeft()
	}
	var err error
	select {
	case <-p.left:
	case <-ctx.Done():
		err = conn.ContextError(ctx)
	}
	p.drain()
	p.mu.Lock()
	if p.dialling > 0 { // nobody waits for those
		p.cancel()
	}
	p.mu.Unlock()
	if err == nil {
		select {
		case <-p.empty:
		case <-ctx.Done():
			err = conn.ContextError(ctx)
		}
	}
	p.shut()
	return err
}

// politeness is how long QUIT may take to be written when the Client is closed.
const politeness = time.Second

// shut ends everything and returns when no goroutine is left.
func (p *pool) shut() {
	p.closed.Store(true)
	p.mu.Lock()
	var idle []*session
	for s := p.idle.first; s != nil; s = p.idle.first {
		s.at.remove()
		s.held = true
		idle = append(idle, s)
	}
	p.mu.Unlock()
	p.drain()
	p.cancel()
	for _, s := range idle {
		s.Retire(conn.Closed)
		timer := time.AfterFunc(politeness, s.InterruptWrites)
		s.Quit()
		timer.Stop()
	}
	p.mu.Lock()
	all := slices.Collect(maps.Keys(p.sessions))
	p.mu.Unlock()
	for _, s := range all {
		s.Kill(ErrClosed)
	}
	p.running.Wait()
}

// workedSince reports whether the relay has answered since t, or taken a large part of a body, on a connection that is still good.
func (p *pool) workedSince(t time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.sessions {
		if s.Moved().After(t) && !s.Failed() {
			return true
		}
	}
	return false
}
