package smtprelay

import (
	"context"
	"time"
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
	at     links[waiter]
	since  time.Time
	served chan struct{} // has room for one; told when session or err is set
	err    *Error
}

// queue is those who wait, first come first served. Urgent ones go before the others, but for every eighth turn.
type queue struct {
	urgent, other list[waiter]
	turn          int
}

const othersTurn = 8

func newQueue() queue {
	place := func(w *waiter) *links[waiter] { return &w.at }
	return queue{urgent: list[waiter]{links: place}, other: list[waiter]{links: place}}
}

// len is how many wait.
func (q *queue) len() int { return q.urgent.len + q.other.len }

// add puts w behind those that wait, or before them if it was throttled.
func (q *queue) add(w *waiter) {
	l := &q.other
	if w.urgent {
		l = &q.urgent
	}
	if w.again {
		l.pushFront(w)
	} else {
		l.pushBack(w)
	}
}

// next is whose turn it is; nil if nobody waits.
func (q *queue) next() *waiter {
	if q.urgent.len == 0 || q.other.len > 0 && q.turn%othersTurn == othersTurn-1 {
		return q.other.first
	}
	return q.urgent.first
}

// serve takes the one whose turn it is out of the queue.
func (q *queue) serve() *waiter {
	w := q.next()
	if q.urgent.len > 0 && q.other.len > 0 {
		q.turn++
	}
	w.at.remove()
	return w
}

// all calls f for each of those who wait; f may take it out.
func (q *queue) all(f func(*waiter)) {
	for _, l := range []*list[waiter]{&q.urgent, &q.other} {
		for w := l.first; w != nil; {
			next := w.at.next
			f(w)
			w = next
		}
	}
}

// list is a doubly linked list. The links are part of its elements, so that putting one in and taking one out costs the same
// however long the list is, and allocates nothing. An element is in one list at a time.
type list[T any] struct {
	first, last *T
	len         int
	links       func(*T) *links[T] // of an element
}

// links are an element's place in a list.
type links[T any] struct {
	prev, next *T
	in         *list[T] // nil: none
}

// pushBack puts e, which is in no list, behind all others.
func (l *list[T]) pushBack(e *T) {
	*l.links(e) = links[T]{prev: l.last, in: l}
	if l.last == nil {
		l.first = e
	} else {
		l.links(l.last).next = e
	}
	l.last = e
	l.len++
}

// pushFront puts e, which is in no list, before all others.
func (l *list[T]) pushFront(e *T) {
	*l.links(e) = links[T]{next: l.first, in: l}
	if l.first == nil {
		l.last = e
	} else {
		l.links(l.first).prev = e
	}
	l.first = e
	l.len++
}

// remove takes e out of the list that it is in.
func (at *links[T]) remove() {
	l := at.in
	if l == nil {
		return
	}
	if at.prev == nil {
		l.first = at.next
	} else {
		l.links(at.prev).next = at.next
	}
	if at.next == nil {
		l.last = at.prev
	} else {
		l.links(at.next).prev = at.prev
	}
	l.len--
	*at = links[T]{}
}
