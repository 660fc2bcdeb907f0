package smtprelay

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// pool keeps the sessions of a Client and hands them out, first come first served.
//
// One count, one lock, one function that frees: each open connection holds a slot from before it is dialled until the
// relay has closed it. Whatever a waiter may be served with (a session given back, one that may be overlapped, a finished
// dial) goes to the oldest one.
type pool struct {
	cfg     *settings
	dial    func(ctx context.Context, id int64) (s *session, leave func(), e *Error)
	waiting atomic.Int32    // len(waiters), for those who only want a hint
	closing context.Context // ends with Close: dials in progress are given up
	cancel  context.CancelFunc
	running sync.WaitGroup // of all goroutines of the Client
	spare   sync.Pool      // *waiter; the Client's own, since a channel must not cross the bubbles of testing/synctest

	mu       sync.Mutex // guards the fields below; never held across I/O or a callback
	slots    *slots
	gate     gate
	sessions map[*session]struct{}
	idle     []*session // free; the one used last is at the end
	ready    []*session // may be overlapped; the one that has waited longest is at the front
	waiters  []*waiter  // oldest first
	dialling int
	lastID   int64
	usedUp   int           // sessions that were full when they ended, since one was last idle
	draining bool          // nothing is handed out any more
	ending   chan struct{} // closed when draining is set
	empty    chan struct{} // closed when draining and no slot is in use
	idleTime *time.Timer   // runs while there are idle sessions
	idleEnds time.Time     // when it runs out
	patience *time.Timer   // runs while somebody waits for a session near its end
}

// session is an open connection and what the pool knows of it.
type session struct {
	*conn.Conn
	id       int64
	pool     *pool
	round    int                 // of the dial gate, when this one was dialled
	sendAway func()              // Conn.SendAway, in a goroutine of the pool's
	domains  map[string]struct{} // of recipients so far, if the relay limits their number; owned by the holder of the write side

	// Guarded by the pool's lock.
	gone      bool // the relay has closed it
	owned     bool // somebody holds the write side
	listed    bool // in idle or ready
	idleSince time.Time
}

// Wanted implements [conn.Owner].
func (s *session) Wanted() bool { return s.pool.waiting.Load() > 0 }

// Handoff implements [conn.Owner].
func (s *session) Handoff() bool { return s.pool.handoff(s) }

// Release implements [conn.Owner].
func (s *session) Release() { s.pool.release(s) }

// SendAway implements [conn.Owner].
func (s *session) SendAway() bool { return s.pool.startSendAway(s) }

// Changed implements [conn.Owner].
func (s *session) Changed() { s.pool.changed(s) }

// Closed implements [conn.Owner].
func (s *session) Closed() { s.pool.sessionClosed(s) }

// waiter is a Send that waits for a session.
type waiter struct {
	ctx      context.Context
	served   chan struct{} // has room for one; told when one of the next two is set
	session  *session
	err      *Error
	attempts int // that its Send has made, and dials that failed while it waited
}

func newPool(cfg *settings, dial func(ctx context.Context, id int64) (*session, func(), *Error)) *pool {
	p := &pool{
		cfg:      cfg,
		dial:     dial,
		slots:    newSlots(cfg.Limits.MaxConns),
		sessions: make(map[*session]struct{}),
		ending:   make(chan struct{}),
		empty:    make(chan struct{}),
	}
	p.spare.New = func() any { return &waiter{served: make(chan struct{}, 1)} }
	p.closing, p.cancel = context.WithCancel(context.Background())
	return p
}

func errClosed() *Error {
	return &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: ErrClosed, permanent: true}
}

// take waits for a session and hands out its write side. attempts is how many tries the caller has made; dials that fail
// while it waits are added.
func (p *pool) take(ctx context.Context, attempts *int) (*session, *Error) {
	began := time.Now()
	p.mu.Lock()
	if p.draining {
		p.mu.Unlock()
		return nil, errClosed()
	}
	if err := conn.ContextError(ctx); err != nil {
		p.mu.Unlock()
		return nil, &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: err}
	}
	if s := p.takeLocked(began); s != nil {
		p.mu.Unlock()
		p.traceGot(ctx, s, 0)
		return s, nil
	}
	if err := p.gate.refusal(began); err != nil && !p.workingLocked() {
		p.mu.Unlock()
		return nil, err
	}
	w := p.spare.Get().(*waiter)
	*w = waiter{ctx: ctx, served: w.served, attempts: *attempts}
	p.waiters = append(p.waiters, w)
	p.waiting.Add(1)
	p.fillLocked(began)
	p.mu.Unlock()

	select {
	case <-w.served:
	case <-ctx.Done():
		if err := p.forget(w); err != nil {
			p.cfg.stats.waitedSince(began)
			*attempts = w.attempts
			p.spare.Put(w)
			return nil, err
		}
		<-w.served // with a session, which may carry somebody's final dot: its transaction sees to that
	}
	p.cfg.stats.waitedSince(began)
	s, err := w.session, w.err
	*attempts = w.attempts
	*w = waiter{served: w.served}
	p.spare.Put(w)
	if s != nil {
		p.traceGot(ctx, s, time.Since(began))
	}
	return s, err
}

// takeLocked returns a session at once if there is one for somebody who comes now: an idle one or, if no further
// connection may be opened, one to overlap on.
func (p *pool) takeLocked(now time.Time) *session {
	if len(p.waiters) > 0 {
		return nil // they were first
	}
	for len(p.idle) > 0 {
		s := p.idle[len(p.idle)-1]
		p.unlistLocked(s)
		if p.spentLocked(s, now.Round(0)) {
			s.Retire(conn.Idle) // the timer goes by the monotonic clock, which stands still while a machine sleeps
		}
		if s.Status(now) == conn.Free {
			s.owned = true
			return s
		}
		p.settleLocked(s, now) // too old, or dead
	}
	if p.mayDialLocked(1, now) {
		return nil
	}
	return p.overlapLocked(now)
}

// overlapLocked returns a session that may be overlapped, nil if there is none.
func (p *pool) overlapLocked(now time.Time) *session {
	for len(p.ready) > 0 {
		s := p.ready[0]
		p.unlistLocked(s)
		if st := s.Status(now); st == conn.Overlappable || st == conn.Free {
			s.owned = true
			return s
		}
	}
	return nil
}

// forget takes w out of the queue and returns the reason to tell; nil means that it has been served.
func (p *pool) forget(w *waiter) *Error {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiters, w)
	if i < 0 {
		return nil
	}
	p.waiters = slices.Delete(p.waiters, i, i+1)
	p.waiting.Add(-1)
	scope := ScopeCaller
	if p.gate.last != nil {
		scope = ScopeRelay
	}
	return &Error{Op: OpWait, Outcome: NotAccepted, Scope: scope, Err: p.explainLocked(conn.ContextError(w.ctx))}
}

// explainLocked adds to err, with which a wait has ended, why there was no connection: how the last one failed, or else
// the step that the one being opened has come to.
func (p *pool) explainLocked(err error) error {
	if last := p.gate.last; last != nil {
		return fmt.Errorf("%w; the last connection tried: %v", err, strings.TrimPrefix(last.Error(), "smtprelay: "))
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
	s.owned = false
	p.settleLocked(s, time.Now())
}

// handoff gives the write side of s to one who waits and can go on at once, and reports whether there is one.
func (p *pool) handoff(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiters) == 0 || p.draining || s.gone {
		return false
	}
	if st := s.Status(time.Now()); st != conn.Overlappable && st != conn.Free {
		return false
	}
	p.serveLocked(s, nil)
	return true
}

// changed is told by a session that a final reply is in, or that it is over.
func (p *pool) changed(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settleLocked(s, time.Now())
}

// settleLocked puts s where its state says, if nobody holds it: to the oldest waiter, to the idle ones, to those that may
// be overlapped, or on its way out.
func (p *pool) settleLocked(s *session, now time.Time) {
	if s.gone || s.owned {
		return
	}
	p.unlistLocked(s)
	st := s.Status(now)
	switch {
	case st == conn.Retired:
		p.quitLocked(s)
	case st == conn.Free && p.draining:
		s.Retire(conn.Closed)
		p.quitLocked(s)
	case st == conn.Busy, st == conn.Lost, p.draining:
	case len(p.waiters) > 0:
		s.owned = true
		p.serveLocked(s, nil)
	case st == conn.Free:
		s.idleSince, s.listed = now, true
		p.idle = append(p.idle, s)
		p.usedUp = 0
		p.watchIdleLocked(now)
	default:
		s.listed = true
		p.ready = append(p.ready, s)
	}
}

func (p *pool) unlistLocked(s *session) {
	if !s.listed {
		return
	}
	s.listed = false
	for _, list := range []*[]*session{&p.idle, &p.ready} {
		if i := slices.Index(*list, s); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
		}
	}
}

// serveLocked gives the oldest waiter a session or an error.
func (p *pool) serveLocked(s *session, err *Error) {
	w := p.waiters[0]
	p.waiters[0] = nil
	p.waiters = p.waiters[1:]
	p.waiting.Add(-1)
	w.session, w.err = s, err
	w.served <- struct{}{}
}

// quitLocked says QUIT on s, in a goroutine that ends when that is written. Nobody gets s any more.
func (p *pool) quitLocked(s *session) {
	s.owned = true
	p.running.Go(s.Quit)
}

// Opening.

// mayDialLocked reports whether a connection would be opened if there were more waiters than there are.
func (p *pool) mayDialLocked(more int, now time.Time) bool {
	return !p.draining && p.slots.open < p.slots.limit() &&
		p.gate.open(now, p.dialling) && len(p.waiters)+more > p.dialling &&
		len(p.waiters)+more > p.dialling+p.endingLocked(now)
}

// endingLocked is how many transactions are left on the sessions that are near their last. While those have room for
// everyone who waits, one more connection would hardly be used: at the end of a burst, ten sessions that are almost used
// up are not followed by an eleventh. A session that has said nothing for a while is not relied on.
func (p *pool) endingLocked(now time.Time) (room int) {
	for s := range p.sessions {
		room += s.LastRoom(now.Add(-endingTrust))
	}
	if room > 0 && p.patience == nil {
		p.patience = time.AfterFunc(endingTrust, p.wake)
	}
	return room
}

// endingTrust is how long somebody may wait for a session near its end, rather than for a new connection.
const endingTrust = time.Second

// fillLocked opens connections for those who wait, as far as the cap and the gate allow, and has the others overlap. It is
// called whenever one of these may have changed.
func (p *pool) fillLocked(now time.Time) {
	for p.mayDialLocked(0, now) && p.slots.take() {
		ctx := context.WithoutCancel(p.waiters[min(p.dialling, len(p.waiters)-1)].ctx)
		p.dialling++
		p.lastID++
		id, round, usedUp := p.lastID, p.gate.round, p.usedUp
		p.running.Go(func() { p.openSession(ctx, id, round, usedUp) })
	}
	for len(p.waiters) > p.dialling {
		s := p.overlapLocked(now)
		if s == nil {
			break
		}
		p.serveLocked(s, nil)
	}
	if len(p.waiters) > 0 && !p.draining {
		p.gate.wakeAt(now, p)
	}
}

// wake looks again at what may be done for those who wait.
func (p *pool) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.draining {
		return // the timer ran out as it was stopped, and no other may follow it
	}
	now := time.Now()
	if p.patience != nil {
		p.patience.Stop()
		p.patience = nil
	}
	p.gate.awake(now, p)
	p.fillLocked(now)
}

// openSession opens a connection, for which a slot was taken. It goes on if the Send it was begun for gives up, and serves
// whoever waits longest when it is done.
func (p *pool) openSession(ctx context.Context, id int64, round, usedUp int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.closing, cancel)()
	s, leave, err := p.dial(ctx, id)
	if err != nil {
		p.mu.Lock()
		p.dialling--
		p.failedLocked(err, round)
		p.mu.Unlock()
		leave()
		p.mu.Lock()
		p.freeLocked()
		p.mu.Unlock()
		return
	}
	s.pool, s.round = p, round
	s.sendAway = func() {
		defer p.running.Done()
		s.Conn.SendAway()
	}
	s.Bound(spread(s.Limit(), usedUp, p.cfg.Limits.MaxConns), s.Expires())
	p.mu.Lock()
	p.dialling--
	s.owned = true
	p.sessions[s] = struct{}{}
	p.running.Go(s.ReadLoop)
	alone := s.PendingAuth() && len(p.waiters) == 0 && !p.draining
	if !s.PendingAuth() {
		p.gate.opened()
	}
	if !alone {
		p.releaseLocked(s) // at once: between, whoever it is for would seem to need one more dial
	}
	p.mu.Unlock()
	if p.closing.Err() != nil { // Close may have swept p.sessions before this one was added
		s.Kill(ErrClosed)
	}
	if alone {
		p.authenticate(ctx, s)
		p.release(s)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fillLocked(time.Now()) // only one dial ran while the gate was closed; start the rest
}

// spread returns how many of limit transactions a session has that was begun when usedUp others had been used up without a
// pause, conns of them at a time. Sessions that are opened together are used up together under load, and so would be those
// that follow them, for ever: so those that follow the second conns have from half to all of the limit. The earlier ones
// have all of it, since a burst that ends soon would pay for the spread and have nothing of it.
func spread(limit, usedUp, conns int) int {
	if n := usedUp - conns; n > 0 && n < conns {
		return max(limit*(conns+n)/(2*conns), min(limit, 1))
	}
	return limit
}

// sessionClosed is told by a session that the relay has closed it.
func (p *pool) sessionClosed(s *session) {
	info := s.Info()
	p.mu.Lock()
	p.unlistLocked(s)
	delete(p.sessions, s)
	s.gone = true
	if info.Reason == conn.Full {
		p.usedUp++
	}
	if publicReply(info.Auth).says(tooManyConns, OpAuth) && p.slots.open > 1 {
		p.crowdedLocked() // before its place is free: its Send, which tells it too, may be later
	}
	p.freeLocked()
	if err := p.gate.refusal(time.Now()); err != nil && !p.workingLocked() {
		p.failAllLocked(err)
	}
	p.mu.Unlock()
	p.traceClosed(s, info)
}

// freeLocked gives back the slot of a connection that is no more.
func (p *pool) freeLocked() {
	p.slots.free()
	if p.draining && p.slots.open == 0 {
		close(p.empty)
	}
	p.fillLocked(time.Now())
}

// workingLocked reports whether a session is open that may serve somebody yet.
func (p *pool) workingLocked() bool {
	now := time.Now()
	for s := range p.sessions {
		switch s.Status(now) {
		case conn.Free, conn.Overlappable:
			return true
		case conn.Busy:
			if s.Usable() {
				return true
			}
		}
	}
	return false
}

// open is how many connections are open or being opened.
func (p *pool) open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slots.open
}

// Failing.

// learn takes what the relay said on s that concerns more than the message at hand.
func (p *pool) learn(s *session, e *Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case e.Op == OpAuth && e.Reply.Code != 0:
		p.failedLocked(e, s.round)
	case e.Reply.Code == 432:
		p.crowdedLocked()
	}
}

// authenticate sends the AUTH that was to lead the first transaction on s alone, if that is still to be sent. The write side
// is the caller's.
func (p *pool) authenticate(ctx context.Context, s *session) *Error {
	r, ok := s.Authenticate(ctx)
	if ok {
		p.worked()
		return nil
	}
	e := verdict(&Message{}, nil, &r)
	if e != nil {
		p.cfg.explainAuth(e)
		p.learn(s, e)
	}
	return e
}

// worked notes that a session has authenticated and does its work.
func (p *pool) worked() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gate.failures > 0 {
		p.gate.opened()
		p.fillLocked(time.Now()) // only one dial ran while the gate was closed; start the rest
	}
}

// failedLocked takes the failure of a dial, or of the AUTH that was part of it. As long as another session works, nobody
// hears of it.
func (p *pool) failedLocked(e *Error, round int) {
	now := time.Now()
	working := p.workingLocked()
	if e.Reply.says(tooManyConns, e.Op) && (working || p.slots.open > 1) { // beside the one that was refused
		p.crowdedLocked()
		p.fillLocked(now)
		return
	}
	if !p.gate.failed(e, round, p.cfg, now) {
		return // one of several that failed together
	}
	if working {
		p.fillLocked(now)
		return
	}
	keep := p.waiters[:0]
	for _, w := range p.waiters {
		w.attempts++
		if e.lasting() || p.cfg.Retry.exhausted(w.attempts) {
			p.waiting.Add(-1)
			w.err = e.clone()
			w.served <- struct{}{}
		} else {
			keep = append(keep, w)
		}
	}
	clear(p.waiters[len(keep):])
	p.waiters = keep
	p.fillLocked(now)
}

func (p *pool) failAllLocked(e *Error) {
	for len(p.waiters) > 0 {
		p.serveLocked(nil, e.clone())
	}
}

// crowdedLocked holds slots back for a while: the relay says that there are too many connections. Those that are open go
// on, and so do those being opened: if there are too many of them too, the relay will say so to each.
func (p *pool) crowdedLocked() {
	if p.draining {
		return
	}
	open := p.dialling
	now := time.Now()
	for s := range p.sessions {
		if st := s.Status(now); st != conn.Lost && st != conn.Retired && !s.Failed() {
			open++
		}
	}
	p.gate.crowded(open, now, p)
}

// Idle sessions.

// watchIdleLocked sees to it that idle sessions end in time.
func (p *pool) watchIdleLocked(now time.Time) {
	var first time.Time
	for _, s := range p.idle {
		if at := p.idleUntilLocked(s); !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	switch {
	case first.IsZero():
	case p.idleTime == nil:
		p.idleTime = time.AfterFunc(first.Sub(now), p.sweep)
		p.idleEnds = first
	case first.Before(p.idleEnds): // by age
		p.idleTime.Reset(first.Sub(now))
		p.idleEnds = first
	}
}

// idleUntilLocked is when s, which is idle, must end; zero means never.
func (p *pool) idleUntilLocked(s *session) time.Time {
	at := s.Expires()
	if limit := p.cfg.Limits.MaxIdleTime; limit > 0 {
		if t := s.idleSince.Add(limit); at.IsZero() || t.Before(at) {
			at = t
		}
	}
	return at
}

// spentLocked reports whether the time of s, which is idle, has come.
func (p *pool) spentLocked(s *session, now time.Time) bool {
	at := p.idleUntilLocked(s)
	return !at.IsZero() && !now.Before(at)
}

// sweep ends the idle sessions whose time has come.
func (p *pool) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idleTime = nil
	now := time.Now()
	for _, s := range slices.Clone(p.idle) {
		if p.spentLocked(s, now) {
			if s.Status(now) != conn.Retired { // not by age
				s.Retire(conn.Idle)
			}
			p.settleLocked(s, now)
		}
	}
	p.watchIdleLocked(now)
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
	p.failAllLocked(errClosed())
	if p.idleTime != nil {
		p.idleTime.Stop()
		p.idleTime = nil
	}
	if p.patience != nil {
		p.patience.Stop()
		p.patience = nil
	}
	p.gate.stop()
	now := time.Now()
	for s := range p.sessions {
		p.settleLocked(s, now)
	}
	if p.slots.open == 0 {
		close(p.empty)
	}
}

// shutdown waits until all is done and closed, or for the end of ctx.
func (p *pool) shutdown(ctx context.Context) error {
	p.drain()
	p.mu.Lock()
	if p.dialling > 0 { // nobody waits for those
		p.cancel()
	}
	p.mu.Unlock()
	var err error
	select {
	case <-p.empty:
	case <-ctx.Done():
		err = conn.ContextError(ctx)
	}
	p.shut()
	return err
}

// politeness is how long QUIT may take to be written when the Client is closed.
const politeness = time.Second

// shut ends everything and returns when no goroutine is left.
func (p *pool) shut() {
	p.mu.Lock()
	idle := slices.Clone(p.idle)
	for _, s := range idle {
		p.unlistLocked(s)
		s.owned = true
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
