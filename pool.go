package smtprelay

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/list"
	"github.com/smtprelay/smtprelay/internal/pace"
)

// pool keeps the sessions of a Client and hands them to waiters, first come first served. open.go decides when to open a session.
//
// Each open connection holds a slot from before it is dialled until the relay has closed it. One counter, under one lock, counts
// the slots, and one function frees them. A session that is released, becomes overlappable or was just opened goes to the oldest
// waiter. Sending a message searches no list: it costs the same with 10 connections and with 10,000.
type pool struct {
	cfg     *settings
	waiting atomic.Int32    // queue.len, readable without mu as a hint
	sends   atomic.Int64    // calls in flight
	closed  atomic.Bool     // Shutdown or Close was called: no further call may begin
	left    chan struct{}   // closed when closed is set and the last call has returned
	allLeft func()          // closes left; may be called more than once
	closing context.Context // cancelled by Close; aborts dials
	cancel  context.CancelFunc
	running sync.WaitGroup // all goroutines of the Client
	spare   sync.Pool      // *waiter; a field because a channel must not be shared between testing/synctest bubbles

	mu         sync.Mutex // guards the fields below; never held across I/O or a callback
	slots      *slots
	gate       gate
	sessions   map[*session]struct{}
	idle       list.List[session] // sessions without a transaction; the most recently used is last
	ready      list.List[session] // sessions that may be overlapped; the one that has waited longest is first
	queue      queue
	pace       pace.Pace
	throttled  Reply              // the last reply that messages come too fast
	stopAsking func()             // cancels the call of Slots.Acquire in progress; nil if there is none
	dialling   int                // dials in progress
	dials      list.List[session] // dials in progress that are not slow yet, oldest first
	slow       int                // dials in progress that are slow; waiters do not rely on them
	greeted    int                // dials in progress that have received a greeting
	crowdRound int                // gate.round + 1 when a dial got "too many connections" before any other was greeted; 0: none
	lastID     int64
	usedUp     int           // sessions that ended because they were full, since a session was last idle
	lastRoom   int           // the sum of session.lastRoom
	trustUntil time.Time     // when to recount lastRoom; zero if no message has had to wait
	through    time.Time     // when the relay last accepted or refused a message, as of the last check
	outageAt   time.Time     // when to check for waiters that have waited for Timeouts.Outage; zero if there are no waiters
	idleEnds   time.Time     // no idle session expires before this time; zero means that none expires
	timer      *time.Timer   // calls wake; nil until first needed
	wakeAt     time.Time     // when timer fires; zero if it is not running
	draining   bool          // no session is handed out any more
	ending     chan struct{} // closed when draining is set
	empty      chan struct{} // closed when draining is set and no slot is in use
}

// session is an open connection and the pool's state for it.
type session struct {
	*conn.Conn
	id       int64
	pool     *pool
	round    int                 // gate.round when the session was dialled, and after that when it was open
	sendAway func()              // Conn.SendAway, run in one of the pool's goroutines
	node     netip.AddrPort      // the address tried last, if the relay has several; owned by the dial, as is remote
	remote   string              // the address that was dialled, if known
	slot     Slot                // from Limits.Slots; Release is nil without Limits.Slots
	closed   chan struct{}       // closed before slot is released
	domains  map[string]struct{} // recipient domains so far, if the relay limits their number; owned by the holder of the write side

	// Guarded by the pool's lock.
	held      bool                // a transaction holds the write side
	gone      bool                // the relay has closed the connection
	at        list.Links[session] // in dials while dialling; then in idle or ready, unless held
	dialled   time.Time           // when the dial began
	idleSince time.Time
	greeted   bool // the relay has sent its greeting; counts in pool.greeted until the dial ends
	lostIdle  bool // the connection was lost while the session was idle
	lastRoom  int  // transactions left, if the session is near its last; see pool.roomLocked
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
	place := func(s *session) *list.Links[session] { return &s.at }
	p := &pool{
		cfg:      cfg,
		slots:    newSlots(cfg.Limits.MaxConns),
		sessions: make(map[*session]struct{}),
		idle:     list.New(place),
		ready:    list.New(place),
		dials:    list.New(place),
		queue:    newQueue(),
		pace:     pace.New(cfg.Limits.Rate),
		left:     make(chan struct{}),
		ending:   make(chan struct{}),
		empty:    make(chan struct{}),
	}
	p.allLeft = sync.OnceFunc(func() { close(p.left) })
	p.spare.New = func() any { return &waiter{served: make(chan struct{}, 1)} }
	p.closing, p.cancel = context.WithCancel(context.Background())
	return p
}

// enter registers a call; leave ends it. enter fails once the Client is closed.
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

// freeLocked returns a session for one message: an idle session, or else one to overlap on, unless a connection could be opened if
// more waiters joined. It returns nil if there is no session.
func (p *pool) freeLocked(more int, now time.Time) *session {
	for s := p.idle.Last; s != nil; s = p.idle.Last {
		s.at.Remove()
		if p.spentLocked(s, now.Round(0)) {
			s.Retire(conn.Idle) // the timer may be late: it uses the monotonic clock, which stops while the machine sleeps
		}
		if s.Status(now) == conn.Free {
			return s
		}
		p.settleLocked(s, now) // expired or lost
	}
	if p.mayDialLocked(more, now) {
		return nil
	}
	return p.overlapLocked(now)
}

// overlapLocked returns a session that may be overlapped; nil if there is none.
func (p *pool) overlapLocked(now time.Time) *session {
	for s := p.ready.First; s != nil; s = p.ready.First {
		s.at.Remove()
		if st := s.Status(now); st == conn.Overlappable || st == conn.Free {
			return s
		}
	}
	return nil
}

// release takes the write side of s back. If the buffer holds another transaction's final dot, release hands s to a waiter,
// whose envelope carries the dot. Without a waiter, a new goroutine flushes the buffer: if the relay reads nothing, the flush
// must not block the caller, a Send of another message.
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

// startSendAway starts s.sendAway in a goroutine. It returns false if s is gone.
func (p *pool) startSendAway(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.gone {
		return false
	}
	p.running.Add(1)
	go s.sendAway() // not a closure: that would be allocated for every second message
	return true
}

// releaseLocked takes the write side of s back.
func (p *pool) releaseLocked(s *session) {
	s.held = false
	p.settleLocked(s, time.Now())
}

// handoff gives the write side of s to the next waiter if that one can start at once, and reports whether it did.
func (p *pool) handoff(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.queue.len() == 0 || p.draining || s.gone || !p.pace.Ready(now) {
		return false
	}
	if st := s.Status(now); st != conn.Overlappable && st != conn.Free {
		return false
	}
	p.serveLocked(s, now)
	return true
}

// changed is called when a final reply has arrived on s (answered), or s can no longer be used.
func (p *pool) changed(s *session, answered bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if answered && s.Info().Decided {
		p.through = now
	}
	p.settleLocked(s, now)
}

// elsewhere reports whether another message would get an idle session, or a new connection, at once.
func (p *pool) elsewhere() bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle.Len > 0 || p.cfg.Limits.Slots == nil && p.mayDialLocked(1, now)
}

// settleLocked moves s according to its state, unless it is held: to the oldest waiter, to the idle or the ready list, or to QUIT.
func (p *pool) settleLocked(s *session, now time.Time) {
	if s.gone || s.held {
		return
	}
	wasIdle := s.at.In == &p.idle
	s.at.Remove()
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
	case p.queue.len() > 0 && p.pace.Ready(now):
		p.serveLocked(s, now)
	case st == conn.Free:
		p.idleLocked(s, now)
	default:
		p.ready.PushBack(s)
	}
}

// grantLocked lends the write side of s, which is in no list, for one message.
func (p *pool) grantLocked(s *session, now time.Time) grant {
	s.held = true
	p.roomLocked(s, s.LastRoom(now.Add(-endingTrust))-1)
	p.pace.Begin(now)
	return grant{session: s, round: p.pace.Round()}
}

// serveLocked gives s to the next waiter.
func (p *pool) serveLocked(s *session, now time.Time) {
	w := p.queue.serve()
	p.waiting.Add(-1)
	failed := w.failed
	w.grant = p.grantLocked(s, now)
	w.failed = failed
	w.served <- struct{}{}
}

// failLocked removes w from the queue and fails it with e.
func (p *pool) failLocked(w *waiter, e *Error) {
	p.leaveLocked(w)
	w.err = e.clone()
	w.served <- struct{}{}
}

// quitLocked starts a goroutine that writes QUIT on s. The session stays held, so that it is not handed out again.
func (p *pool) quitLocked(s *session) {
	s.held = true
	p.running.Go(s.Quit)
}

// The timer.

// wake runs all timed work that is due, and then serves waiters.
func (p *pool) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeAt = time.Time{}
	if p.draining {
		return // the timer fired while drain stopped it; do not start another
	}
	now := time.Now()
	p.slots.raiseDue(now)
	p.sweepLocked(now)
	p.countRoomLocked(now)
	p.slowDialsLocked(now)
	p.endOutageLocked(now)
	p.fillLocked(now)
}

// nextWakeLocked returns when the next timed work is due; zero means never.
func (p *pool) nextWakeLocked(now time.Time) time.Time {
	at := earliest(p.slots.raiseAt, p.idleEnds)
	if p.queue.len() == 0 {
		return at
	}
	at = earliest(at, p.trustUntil)
	at = earliest(at, p.outageAt)
	if p.dials.First != nil {
		at = earliest(at, p.dials.First.dialled.Add(slowDial))
	}
	for _, t := range []time.Time{p.gate.opens(), p.pace.Next()} {
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

// planLocked sets the timer. It must be called whenever nextWakeLocked may have become earlier.
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

// sweepPause is the least time between two sweeps of the idle list.
const sweepPause = 50 * time.Millisecond

// idleLocked adds s, which is free, to the idle list.
func (p *pool) idleLocked(s *session, now time.Time) {
	s.idleSince = now
	p.idle.PushBack(s)
	p.usedUp = 0
	p.stopAskingLocked()
	p.idleEnds = earliest(p.idleEnds, p.idleUntilLocked(s))
	p.planLocked(now)
}

// Ending.

// drain stops handing out sessions: it fails all waiters, and ends each session with QUIT once its last transaction is done.
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

// shutdown waits for the calls in flight and for all sessions to end, or for the end of ctx. Then it closes the pool.
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
	if p.dialling > 0 { // no waiter is left for these dials
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

// politeness is how long writing QUIT on an idle session may take when the Client is closed.
const politeness = time.Second

// shut ends all sessions and dials at once, and returns when no goroutine is left.
func (p *pool) shut() {
	p.closed.Store(true)
	p.mu.Lock()
	var idle []*session
	for s := p.idle.First; s != nil; s = p.idle.First {
		s.at.Remove()
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

// workedSince reports whether a session that has not failed has received a reply, or finished a large write, after t.
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
