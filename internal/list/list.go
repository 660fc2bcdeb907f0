// Package list is a linked list whose links are part of its elements.
package list

// List is a doubly linked list. The links are part of its elements, so that putting one in and taking one out costs the same
// however long the list is, and allocates nothing. An element is in one list at a time.
type List[T any] struct {
	First, Last *T
	Len         int
	links       func(*T) *Links[T] // of an element
}

// New returns an empty list of elements that have their Links where links says.
func New[T any](links func(*T) *Links[T]) List[T] { return List[T]{links: links} }

// Links are an element's place in a list.
type Links[T any] struct {
	Prev, Next *T
	In         *List[T] // nil: none
}

// PushBack puts e, which is in no list, behind all others.
func (l *List[T]) PushBack(e *T) {
	*l.links(e) = Links[T]{Prev: l.Last, In: l}
	if l.Last == nil {
		l.First = e
	} else {
		l.links(l.Last).Next = e
	}
	l.Last = e
	l.Len++
}

// PushFront puts e, which is in no list, before all others.
func (l *List[T]) PushFront(e *T) {
	*l.links(e) = Links[T]{Next: l.First, In: l}
	if l.First == nil {
		l.Last = e
	} else {
		l.links(l.First).Prev = e
	}
	l.First = e
	l.Len++
}

// Remove takes e out of the list that it is in.
func (at *Links[T]) Remove() {
	l := at.In
	if l == nil {
		return
	}
	if at.Prev == nil {
		l.First = at.Next
	} else {
		l.links(at.Prev).Next = at.Next
	}
	if at.Next == nil {
		l.Last = at.Prev
	} else {
		l.links(at.Next).Prev = at.Prev
	}
	l.Len--
	*at = Links[T]{}
}
