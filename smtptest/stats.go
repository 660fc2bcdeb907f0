package smtptest

import (
	"maps"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Message is a message that the relay has taken.
type Message struct {
	ID          string // the queue ID, as in the reply
	Conn        int    // the connection it came on, counted from 1
	Nth         int    // the MAIL command of the connection that it came with, counted from 1
	From        string // the reverse-path, as it stood between the brackets
	To          []string
	MailOptions smtprelay.MailOptions
	RcptOptions []smtprelay.RcptOptions // one for each of To
	Body        []byte                  // as it was before dots were stuffed; nil with DropBodies. Not to be changed
	Size        int64                   // of the body
	SHA256      [32]byte                // of the body
	Chunked     bool                    // whether it came by BDAT
	Received    time.Time
}

// ConnStats is what has happened on one connection.
type ConnStats struct {
	Conn          int  // counted from 1
	Open          bool // the relay has not closed it
	Refused       bool // for MaxConns
	TLS           bool
	TLSResumed    bool
	Authenticated bool
	Mails         int            // MAIL commands, refused ones included
	Accepted      int            // messages
	Auths         int            // AUTH commands
	Overlapped    int            // MAIL commands that came without a wait for the reply to the final dot before them
	Turns         int            // see Server.Turns
	MessageTurns  int            // see Server.MessageTurns
	Commands      map[string]int // by verb, in upper case; those that the relay does not know are under ""
}

// Messages returns the messages that were taken, in that order.
func (s *Server) Messages() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.messages)
}

// Accepted returns how many messages were taken.
func (s *Server) Accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.messages)
}

// Duplicates returns how many messages were taken whose envelope and body equal those of an earlier one.
func (s *Server) Duplicates() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.duplicates
}

// Conns returns what has happened on each connection, closed ones included, in the order in which they were opened.
func (s *Server) Conns() []ConnStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make([]ConnStats, len(s.conns))
	for i, c := range s.conns {
		stats[i] = c.statsLocked()
	}
	return stats
}

func (c *conn) statsLocked() ConnStats {
	st := c.stats
	st.Commands = maps.Clone(st.Commands)
	st.Turns = int(c.wire.turns.Load())
	if st.Mails > 0 {
		st.MessageTurns = st.Turns - c.turnsBefore
	}
	return st
}

// Open returns how many connections are open. A connection ceases to be before the client can see that the relay closes it.
func (s *Server) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// MaxOpen returns how many connections have been open at one time at most, those refused for it included.
func (s *Server) MaxOpen() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.maxOpen
}

// Refused421 returns how many connections and MAIL commands were refused for MaxConns and MaxMessages.
func (s *Server) Refused421() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused421
}

// Auths returns how many AUTH commands came on all connections together.
func (s *Server) Auths() int { return s.sum(func(st ConnStats) int { return st.Auths }) }

// Noops returns how many NOOP commands came on all connections together.
func (s *Server) Noops() int { return s.sum(func(st ConnStats) int { return st.Commands["NOOP"] }) }

// Rsets returns how many RSET commands came on all connections together.
func (s *Server) Rsets() int { return s.sum(func(st ConnStats) int { return st.Commands["RSET"] }) }

// Overlapped returns how many MAIL commands came without a wait for the reply to the final dot before them.
func (s *Server) Overlapped() int { return s.sum(func(st ConnStats) int { return st.Overlapped }) }

// Turns returns how often, on all connections together, the relay had answered all that it had got, waited, and then got
// something: the round trips that the client has spent, those of the TLS handshake included.
//
// With a Delay, what comes sooner than one Delay after the oldest answer since the last turn is none, since nobody can have
// waited for that answer: the count is exact however the network cuts the dialogue. Without one, whatever had not come yet when
// the relay answered is a turn: exact for a client that waits for its answers, and perhaps too many for one that does not.
func (s *Server) Turns() int { return s.sum(func(st ConnStats) int { return st.Turns }) }

// MessageTurns returns how many of the turns went to messages rather than to setting up connections: on each connection
// those from the turn on that brought the first MAIL, itself included. One message after another costs two each where
// PIPELINING is used: the envelope, and the body. Where each envelope follows the final dot of the message before it, n
// messages cost n+1.
func (s *Server) MessageTurns() int { return s.sum(func(st ConnStats) int { return st.MessageTurns }) }

func (s *Server) sum(f func(ConnStats) int) (n int) {
	for _, st := range s.Conns() {
		n += f(st)
	}
	return n
}
