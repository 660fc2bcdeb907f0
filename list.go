package smtprelay

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
