package smtptest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Message is a message that the relay has accepted.
type Message struct {
	ID          string   // the queue ID, as in the reply
	Conn        int      // the connection that sent it, 1-based
	Nth         int      // the number of its MAIL command on the connection, 1-based
	From        string   // the envelope sender, without brackets
	To          []string // the accepted envelope recipients, in their order
	MailOptions smtprelay.MailOptions
	RcptOptions []smtprelay.RcptOptions // one for each of To
	Body        []byte                  // without dot stuffing; nil with DropBodies. It must not be changed
	Size        int64                   // of the body, in octets
	SHA256      [32]byte                // of the body
	Chunked     bool                    // sent with BDAT
	Received    time.Time               // when the relay accepted it
}

// Stats are the counters of a Server, for all connections together.
type Stats struct {
	Conns      int // connections that clients have opened, including refused ones
	Open       int // connections that the relay has not closed
	MaxOpen    int // the maximum of Open, including connections refused for MaxConns
	Refused    int // connections and MAIL commands refused for MaxConns and MaxMessages, not those refused by a Fault
	Accepted   int // messages that the relay has accepted: len(Messages()), unless Server.Keep forgets some
	Duplicates int // accepted messages whose envelope and body equal those of an earlier one
	Mails      int // MAIL commands, refused ones included
	Auths      int // AUTH commands, refused ones included
	Overlapped int // MAIL commands that did not wait for the reply to the previous final dot

	// Turns is the number of round trips that clients have spent, including those of the TLS handshake. A turn is: the relay has
	// replied to all input, waits, and receives more.
	//
	// With a Delay, input that arrives sooner than one Delay after the oldest reply since the last turn is no turn: the client
	// cannot have waited for that reply. So the count is exact however the network splits the dialogue. Without a Delay, any
	// input that had not arrived when the relay replied is a turn. That is exact for a client that waits for replies, and may be
	// too high for others.
	Turns int

	// MessageTurns is the part of Turns that was spent on messages and not on opening connections: on each connection, the turn
	// of the first MAIL and all later ones. With PIPELINING a message costs two turns, for the envelope and the body. If each
	// envelope follows the previous message's final dot at once, n messages cost n+1 turns.
	MessageTurns int

	// Commands counts the commands, by verb in upper case. Unknown commands are counted under "".
	Commands map[string]int
}

// ConnStats are the counters of one connection.
type ConnStats struct {
	Conn          int            // 1-based
	Addr          int            // the address that it was made to, 1-based; see Server.Addresses
	Open          bool           // the relay has not closed it
	Refused       bool           // for MaxConns
	TLS           bool           // a handshake has succeeded
	TLSResumed    bool           // the handshake resumed a session of an earlier connection
	Authenticated bool           // AUTH has succeeded, whatever the reply said
	Mails         int            // MAIL commands, refused ones included
	Accepted      int            // messages
	Auths         int            // AUTH commands
	Overlapped    int            // MAIL commands that did not wait for the reply to the previous final dot
	Turns         int            // see Stats.Turns
	MessageTurns  int            // see Stats.MessageTurns
	Commands      map[string]int // by verb, in upper case; unknown commands are counted under ""
}

// Stats returns a consistent snapshot of the counters. It is safe for concurrent use, and the caller may change the result. A
// reply is counted before the client can receive it.
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

// add adds the counters of one connection, or of several together.
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

// forgetConnsLocked drops the oldest closed connections beyond Keep, and adds their counters to past.
func (s *Server) forgetConnsLocked() {
	for s.Keep != 0 && s.over > max(0, s.Keep) {
		oldest := slices.IndexFunc(s.conns, func(c *conn) bool { return c.over })
		s.past.add(s.conns[oldest].statsLocked())
		s.conns = slices.Delete(s.conns, oldest, oldest+1)
		s.over--
	}
}

// Messages returns the accepted messages, oldest first: all, or the last Server.Keep ones. The caller may change the slice, but
// not the data that its elements refer to.
func (s *Server) Messages() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.messages)
}

// Wait waits until the relay has accepted n messages since its start. If ctx ends first, it returns an error that wraps the error
// of ctx and gives the number accepted.
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

// Conns returns the counters of each connection, including refused and closed ones, in the order in which they were opened. Of
// the closed ones it returns the last Server.Keep. The caller may change the result.
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

// statsLocked returns a copy of the connection's counters.
func (c *conn) statsLocked() ConnStats {
	st := c.stats
	st.Turns = int(c.wire.turns.Load())
	if st.Mails > 0 {
		st.MessageTurns = st.Turns - c.turnsBefore
	}
	return st
}
