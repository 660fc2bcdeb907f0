package smtprelay

import (
	"context"
	"time"

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
