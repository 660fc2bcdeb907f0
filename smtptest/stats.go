package smtptest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Message is a message that the relay has taken.
type Message struct {
	ID          string   // the queue ID, as in the reply
	Conn        int      // the connection it came on, counted from 1
	Nth         int      // the MAIL command of the connection that it came with, counted from 1
	From        string   // the reverse-path, as it stood between the brackets
	To          []string // the forward-paths that were accepted, in their order
	MailOptions smtprelay.MailOptions
	RcptOptions []smtprelay.RcptOptions // one for each of To
	Body        []byte                  // as it was before dots were stuffed; nil with DropBodies. Not to be changed
	Size        int64                   // of the body, in octets
	SHA256      [32]byte                // of the body
	Chunked     bool                    // whether it came by BDAT
	Received    time.Time               // when the relay took it
}

// Stats is what has happened at a Server, or on all connections of it together.
type Stats struct {
	Conns      int // connections that clients have opened, refused ones included
	Open       int // of these, the ones that the relay has not closed
	MaxOpen    int // how many were open at one time at most, those refused for it included
	Refused    int // connections and MAIL commands refused for MaxConns and MaxMessages; what a Fault refuses is not among them
	Accepted   int // messages that the relay has taken: len(Messages()), unless Server.Keep forgets some
	Duplicates int // of these, the ones whose envelope and body equal those of an earlier one
	Mails      int // MAIL commands, refused ones included
	Auths      int // AUTH commands, refused ones included
	Overlapped int // MAIL commands that came without a wait for the reply to the final dot before them

	// Turns is how often the relay had answered all that it had got, waited, and then got something: the round trips that the
	// client has spent, those of the TLS handshake included.
	//
	// With a Delay, what comes sooner than one Delay after the oldest answer since the last turn is none, since nobody can have
	// waited for that answer: the count is exact however the network cuts the dialogue. Without one, whatever had not come yet
	// when the relay answered is a turn: exact for a client that waits for its answers, and perhaps too many for one that does
	// not.
	Turns int

	// MessageTurns is how many of Turns went to messages rather than to setting up connections: on each connection those from
	// the turn on that brought the first MAIL, itself included. One message after another costs two each where PIPELINING is
	// used: the envelope, and the body. Where each envelope follows the final dot of the message before it, n messages cost n+1.
	MessageTurns int

	// Commands is how often each command came, by verb in upper case. Those that the relay does not know are under "".
	Commands map[string]int
}

// ConnStats is what has happened on one connection.
type ConnStats struct {
	Conn          int            // counted from 1
	Addr          int            // the address that it was made to, counted from 1; see Server.Addresses
	Open          bool           // the relay has not closed it
	Refused       bool           // for MaxConns
	TLS           bool           // a handshake has succeeded
	TLSResumed    bool           // with a session of an earlier connection
	Authenticated bool           // AUTH has succeeded, whatever the client was told
	Mails         int            // MAIL commands, refused ones included
	Accepted      int            // messages
	Auths         int            // AUTH commands
	Overlapped    int            // MAIL commands that came without a wait for the reply to the final dot before them
	Turns         int            // see Stats.Turns
	MessageTurns  int            // see Stats.MessageTurns
	Commands      map[string]int // by verb, in upper case; those that the relay does not know are under ""
}

// Stats returns what has happened so far, as one consistent picture. It is safe for concurrent use, and the caller may change
// what it gets. What a client was told is counted before the client can know it.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{
		Conns:      s.opened,
		Open:       s.open,
		MaxOpen:    s.maxOpen,
		Refused:    s.refused,
		Accepted:   s.accepted,
		Duplicates: s.duplicates,
		Commands:   make(map[string]int),
	}
	st.add(ConnStats{Mails: s.past.Mails, Auths: s.past.Auths, Overlapped: s.past.Overlapped, Turns: s.past.Turns,
		MessageTurns: s.past.MessageTurns, Commands: s.past.Commands})
	for _, c := range s.conns {
		st.add(c.statsLocked())
	}
	return st
}

// add adds what has happened on one connection, or on several together.
func (st *Stats) add(one ConnStats) {
	st.Mails += one.Mails
	st.Auths += one.Auths
	st.Overlapped += one.Overlapped
	st.Turns += one.Turns
	st.MessageTurns += one.MessageTurns
	for verb, n := range one.Commands {
		st.Commands[verb] += n
	}
}

// forgetMessagesLocked drops the oldest messages beyond Keep.
func (s *Server) forgetMessagesLocked() {
	for s.Keep != 0 && len(s.messages) > max(0, s.Keep) {
		same := s.messages[0].identity()
		if s.seen[same]--; s.seen[same] == 0 {
			delete(s.seen, same)
		}
		s.messages[0] = Message{}
		s.messages = s.messages[1:]
	}
}

// forgetConnsLocked drops the oldest closed connections beyond Keep, and adds up what has happened on them.
func (s *Server) forgetConnsLocked() {
	for s.Keep != 0 && s.over > max(0, s.Keep) {
		oldest := slices.IndexFunc(s.conns, func(c *conn) bool { return c.over })
		s.past.add(s.conns[oldest].statsLocked())
		s.conns = slices.Delete(s.conns, oldest, oldest+1)
		s.over--
	}
}

// Messages returns the messages that the relay has taken, in that order: all, or as many as Server.Keep says. The slice is the caller's; what its elements refer to
// must not be changed.
func (s *Server) Messages() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.messages)
}

// Wait waits until the relay has taken n messages since it was started, however long that is ago. If ctx ends first, it returns
// an error that wraps the one of ctx and tells how many there were.
func (s *Server) Wait(ctx context.Context, n int) error {
	for {
		s.mu.Lock()
		if s.grown == nil {
			s.grown = make(chan struct{})
		}
		have, grown := s.accepted, s.grown
		s.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return fmt.Errorf("smtptest: %d of %d messages have come: %w", have, n, ctx.Err())
		}
	}
}

// Conns returns what has happened on each connection, closed and refused ones included, in the order in which they were opened;
// of closed ones as many as Server.Keep says.
// The caller may change what it gets.
func (s *Server) Conns() []ConnStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make([]ConnStats, len(s.conns))
	for i, c := range s.conns {
		stats[i] = c.statsLocked()
		stats[i].Commands = maps.Clone(stats[i].Commands)
	}
	return stats
}

// statsLocked returns what has happened on the connection, with its own map of commands.
func (c *conn) statsLocked() ConnStats {
	st := c.stats
	st.Turns = int(c.wire.turns.Load())
	if st.Mails > 0 {
		st.MessageTurns = st.Turns - c.turnsBefore
	}
	return st
}
