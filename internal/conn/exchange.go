package conn

import (
	"time"
)

// exchange is a command whose reply is outstanding.
type exchange struct {
	op      Step
	final   bool          // the end of a message: the reply accepts or refuses the message
	end     int64         // position that must be written before a reply can arrive
	tx      *Transaction  // receives the reply; nil for QUIT
	rcpt    int           // index of the recipient, for StepRcpt
	limit   time.Duration // for the reply, counted from when the exchange is the oldest and end is written; 0 means no limit
	first   bool          // the first command after an unanswered final dot
	follows bool          // after an unanswered final dot, in a transaction whose message has not left
	left    bool          // the transaction no longer waits for the reply
}

// exchanges is the queue of commands whose reply is outstanding. Replies arrive in the order of the commands, so the next reply
// belongs to the oldest exchange.
type exchanges struct {
	list []exchange // the exchanges before head are done
	head int
}

func (q *exchanges) empty() bool { return q.head == len(q.list) }

// alone reports whether exactly one exchange is outstanding.
func (q *exchanges) alone() bool { return len(q.list)-q.head == 1 }

// all returns the outstanding exchanges, oldest first. The slice is valid until the next add or take.
func (q *exchanges) all() []exchange { return q.list[q.head:] }

// oldest returns the exchange that the next reply belongs to. The queue must not be empty.
func (q *exchanges) oldest() *exchange { return &q.list[q.head] }

func (q *exchanges) add(x exchange) { q.list = append(q.list, x) }

// take removes and returns the oldest exchange.
func (q *exchanges) take() exchange {
	x := q.list[q.head]
	q.list[q.head] = exchange{} // so that its transaction is not kept alive
	if q.head++; q.empty() {
		q.list, q.head = q.list[:0], 0
	}
	return x
}
