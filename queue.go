package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/list"
)

// ask is what a Send asks the pool for.
type ask struct {
	urgent   bool          // before those that are not
	once     bool          // a dial that fails while it waits ends it
	failFast bool          // rather an error than a wait for a relay that cannot be reached
	again    bool          // a message that was throttled: before all others of its kind
	admitted bool          // a message that was in the queue before: MaxWaiting does not end it
	patient  bool          // MaxWaiting does not end it
	waited   time.Duration // before, for other tries of the message
}

// grant is what the pool gives.
type grant struct {
	session *session
	round   int // of the pace
	failed  int // connections that could not be opened meanwhile
	waited  time.Duration
}

// waiter is a Send that waits for a session.
type waiter struct {
	ask
	grant
	ctx    context.Context
	at     list.Links[waiter]
	since  time.Time
	served chan struct{} // has room for one; told when session or err is set
	err    *Error
}

// queue is those who wait, first come first served. Urgent ones go before the others, but for every eighth turn.
type queue struct {
	urgent, other list.List[waiter]
	turn          int
}

const othersTurn = 8

func newQueue() queue {
	place := func(w *waiter) *list.Links[waiter] { return &w.at }
	return queue{urgent: list.New(place), other: list.New(place)}
}

// len is how many wait.
func (q *queue) len() int { return q.urgent.Len + q.other.Len }

// add puts w behind those that wait, or before them if it was throttled.
func (q *queue) add(w *waiter) {
	l := &q.other
	if w.urgent {
		l = &q.urgent
	}
	if w.again {
		l.PushFront(w)
	} else {
		l.PushBack(w)
	}
}

// next is whose turn it is; nil if nobody waits.
func (q *queue) next() *waiter {
	if q.urgent.Len == 0 || q.other.Len > 0 && q.turn%othersTurn == othersTurn-1 {
		return q.other.First
	}
	return q.urgent.First
}

// serve takes the one whose turn it is out of the queue.
func (q *queue) serve() *waiter {
	w := q.next()
	if q.urgent.Len > 0 && q.other.Len > 0 {
		q.turn++
	}
	w.at.Remove()
	return w
}

// all calls f for each of those who wait; f may take it out.
func (q *queue) all(f func(*waiter)) {
	for _, l := range []*list.List[waiter]{&q.urgent, &q.other} {
		for w := l.First; w != nil; {
			next := w.at.Next
			f(w)
			w = next
		}
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

// forget takes w out of the queue and returns the reason to tell; nil means that it has been served.
func (p *pool) forget(w *waiter) *Error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.at.In == nil {
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
	w.at.Remove()
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
