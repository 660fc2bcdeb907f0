// Package list is a linked list whose links are part of its elements.
package list

// List is a doubly linked list. The links are part of its elements, so that inserting and removing an element takes constant
// time and allocates nothing. An element is in at most one list at a time.
type List[T any] struct {
	First, Last *T
	Len         int
	links       func(*T) *Links[T] // returns an element's Links
}

// New returns an empty list. links returns the Links of an element.
func New[T any](links func(*T) *Links[T]) List[T] { return List[T]{links: links} }

// Links are an element's place in a list.
type Links[T any] struct {
	Prev, Next *T
	In         *List[T] // the list that contains the element; nil: none
}

// PushBack appends e, which must be in no list.
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

// PushFront inserts e, which must be in no list, at the front.
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

// Remove removes the element from its list, if it is in one.
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
