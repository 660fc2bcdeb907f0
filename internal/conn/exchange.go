package conn

import (
	"time"
)

// exchange is a command whose reply is outstanding.
type exchange struct {
	op    Step
	final bool          // its reply decides over the message
	end   int64         // the position behind the octets that must leave for a reply to come
	tx    *Transaction  // told of the reply; nil for QUIT
	rcpt  int           // which recipient, for StepRcpt
	limit time.Duration // for the reply, counted from when no other is awaited before it and end has left; 0 means none
	first bool          // of what was written behind a final dot that had no reply yet
}

// exchanges are the commands whose reply is outstanding. Replies come in the order of commands, so each belongs to the oldest.
type exchanges struct {
	list []exchange // from head on
	head int
}

func (q *exchanges) empty() bool { return q.head == len(q.list) }

// alone reports whether there is one.
func (q *exchanges) alone() bool { return len(q.list)-q.head == 1 }

// all returns them, oldest first. They are valid until the next change.
func (q *exchanges) all() []exchange { return q.list[q.head:] }

// oldest is the one that the next reply belongs to. There must be one.
func (q *exchanges) oldest() *exchange { return &q.list[q.head] }

func (q *exchanges) add(x exchange) { q.list = append(q.list, x) }

// take takes the oldest out.
func (q *exchanges) take() exchange {
	x := q.list[q.head]
	q.list[q.head] = exchange{} // so that its transaction is not kept alive
	if q.head++; q.empty() {
		q.list, q.head = q.list[:0], 0
	}
	return x
}
