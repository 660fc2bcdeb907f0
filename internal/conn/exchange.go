package conn

import (
	"time"
)

// exchange is a command whose reply is outstanding.
type exchange struct {
	op     Step
	final  bool          // the end of a message: its reply accepts or refuses it
	end    int64         // the position that must be written before a reply can come
	tx     *Transaction  // told of the reply; nil for QUIT
	rcpt   int           // which recipient, for StepRcpt
	limit  time.Duration // for the reply, counted from when it is the oldest and end is written; 0 means none
	first  bool          // the first command behind an unanswered final dot
	behind bool          // behind that one, and its message has not left
	left   bool          // nobody waits for the reply any more
}

// exchanges are the commands whose reply is outstanding. Replies come in the order of commands, so each belongs to the oldest.
type exchanges struct {
	list []exchange // those before head are done
	head int
}

func (q *exchanges) empty() bool { return q.head == len(q.list) }

// alone reports whether there is exactly one.
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
