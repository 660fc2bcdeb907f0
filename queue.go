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

// ask is a Send's request to the pool for a session.
type ask struct {
	urgent   bool          // served before requests that are not urgent
	once     bool          // fails when a dial fails during the wait
	failFast bool          // fails at once if the relay cannot be reached
	again    bool          // a message that was throttled: goes to the front of its queue
	admitted bool          // a message that was in the queue before: MaxWaiting does not apply
	patient  bool          // MaxWaiting does not apply
	waited   time.Duration // time that earlier attempts of the message have waited
}

// grant is the pool's answer to an ask.
type grant struct {
	session *session
	round   int           // pace.Round
	failed  int           // dials that failed during the wait
	waited  time.Duration // how long take has waited
}

// waiter is a Send that waits for a session.
type waiter struct {
	ask
	grant
	ctx    context.Context
	at     list.Links[waiter]
	since  time.Time
	served chan struct{} // buffered, size 1: session or err is set
	err    *Error
}

// queue holds the waiters, first come first served. Urgent waiters go first, except at every eighth turn.
type queue struct {
	urgent, other list.List[waiter]
	turn          int
}

const othersTurn = 8

func newQueue() queue {
	place := func(w *waiter) *list.Links[waiter] { return &w.at }
	return queue{urgent: list.New(place), other: list.New(place)}
}

// len returns the number of waiters.
func (q *queue) len() int { return q.urgent.Len + q.other.Len }

// add appends w; a message that was throttled goes to the front.
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

// next returns the next waiter; nil if the queue is empty.
func (q *queue) next() *waiter {
	if q.urgent.Len == 0 || q.other.Len > 0 && q.turn%othersTurn == othersTurn-1 {
		return q.other.First
	}
	return q.urgent.First
}

// serve removes and returns the next waiter.
func (q *queue) serve() *waiter {
	w := q.next()
	if q.urgent.Len > 0 && q.other.Len > 0 {
		q.turn++
	}
	w.at.Remove()
	return w
}

// all calls f for each waiter; f may remove it.
func (q *queue) all(f func(*waiter)) {
	for _, l := range []*list.List[waiter]{&q.urgent, &q.other} {
		for w := l.First; w != nil; {
			next := w.at.Next
			f(w)
			w = next
		}
	}
}

// take waits for a session and lends its write side to the caller.
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
		<-w.served // a session was granted, and its buffer may hold another message's final dot: the caller's transaction flushes it
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

// takeLocked returns a session or an error if want need not wait; otherwise neither.
func (p *pool) takeLocked(ctx context.Context, want ask, now time.Time) (grant, *Error) {
	if p.draining {
		return grant{}, errClosed()
	}
	if err := conn.ContextError(ctx); err != nil {
		return grant{}, &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: err}
	}
	if p.queue.len() == 0 && p.pace.Ready(now) {
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

// refusalLocked returns the error for a request that would need a new connection and should not wait: the credentials are known
// to be wrong, or the relay cannot be reached and failFast is set. It returns nil if the request should wait.
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

// forget removes w, whose context has ended, from the queue and returns the error; nil means that w was served already.
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

// leaveLocked removes w from the queue.
func (p *pool) leaveLocked(w *waiter) {
	w.at.Remove()
	p.waiting.Add(-1)
}

// explainLocked adds to err, which ended a wait, why there was no connection: the error of the last dial, or else the step that
// the dial in progress has reached.
func (p *pool) explainLocked(err error) error {
	if last := p.gate.last; last != nil {
		return fmt.Errorf("%w; the last connection tried: %v", err, strings.TrimPrefix(last.Error(), "smtprelay: "))
	}
	if p.stopAsking != nil {
		return fmt.Errorf("%w; other processes hold all places of Limits.Slots", err)
	}
	op, known := p.cfg.opening.Load().(Op)
	if p.dialling == 0 || !known {
		return err
	}
	err = fmt.Errorf("%w; a connection to %s is being opened, at step: %s", err, p.cfg.Addr, op.Text())
	if op == OpGreeting && !p.cfg.implicit() {
		err = fmt.Errorf("%w; %s", err, p.cfg.silenceHint())
	}
	return err
}
