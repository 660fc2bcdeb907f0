package conn

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"net"
	"sync"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Options are what the connections to one relay have in common. They do not change once the first one is opened.
type Options struct {
	Timeouts  Timeouts
	LocalName func(net.Conn) string // the argument of EHLO

	Pipelining  bool // commands may be written without awaiting the reply to the one before
	Overlap     bool // and behind a final dot that has no reply yet
	Chunking    bool // bodies may go in chunks
	MaxInFlight int  // messages on their way without final reply, in chunks

	TLS      *tls.Config // nil: there is none
	Implicit bool        // TLS begins with the first byte, not with STARTTLS

	// Clear says what may cross a connection without TLS: mail, if the relay does not offer STARTTLS, and credentials.
	Clear func(net.Conn) (mail, credentials bool)

	// Mechanism chooses how to authenticate; nil: not at all, and HELO will do. An error that is an *OpenError is returned by Open as it is.
	Mechanism func(ctx context.Context, ext *wire.Extensions, state *tls.ConnectionState) (sasl.Client, error)
	// OtherMechanism, if not nil, is what to try where the relay does not take the mechanism refused (502, 504) although it
	// offers it; it may return nil.
	OtherMechanism func(refused string, ext *wire.Extensions) sasl.Client
	Secrets        func() (username, password string) // that Mechanism may give away, beside what it is seen to
	Said           *scrub.Known                       // what connections have given away

	Profile  Profile
	Progress func(Step) // told of each step of Open that is waited for

	transactions sync.Pool // *Transaction; of these Options, since a channel must not cross the bubbles of testing/synctest
}

// Timeouts bound the steps of a connection; 0 means no limit. Quit has a limit in any case.
type Timeouts struct {
	Greeting   time.Duration // the first reply; and each of those until the connection is ready, if Command is not less
	TLS        time.Duration // the TLS handshake
	Command    time.Duration // the reply to a command; for AUTH all rounds
	First      time.Duration // the reply to the first MAIL, if Command is not less
	Data       time.Duration // the reply to DATA
	Write      time.Duration // writing to a relay that takes nothing; see progressConn
	Unacked    time.Duration // the acknowledgement of what was sent, by the relay's kernel
	FinalReply time.Duration // the reply to the final dot
	Drain      time.Duration // the same, once the context of the message has ended
	Overlap    time.Duration // the first reply to what was written behind a final dot, once that has its own
	Quit       time.Duration // the relay's close, the first half after QUIT, the rest after FIN
}

// openingLimit is the limit for each reply until the connection is ready.
func (o *Options) openingLimit() time.Duration {
	limit := o.Timeouts.Command
	if g := o.Timeouts.Greeting; g > 0 && (limit == 0 || g < limit) {
		limit = g
	}
	return limit
}

// untilFIN is the part of Quit that the relay has to close because of QUIT. The rest it has after FIN: a relay that does not heed
// QUIT closes then, and until it has, it counts the connection.
func (t Timeouts) untilFIN() time.Duration { return (t.Quit + 1) / 2 } // not 0, which would be no limit

// Profile is what is known about the relay, and learns from each connection. It is safe for concurrent use; its methods
// return at once and take no lock that is held while a Conn is called.
type Profile interface {
	Overlaps() bool                                                       // commands may follow a final dot
	OverlapFailed()                                                       // the relay refused those, or threw them away
	AuthTurn(ctx context.Context) (done func(), ok bool)                  // waits until it is one's turn to authenticate; false: for too long
	AuthMayBeFollowed() bool                                              // commands may follow AUTH in one write
	AuthFollowedFailed(r wire.Reply) (so bool)                            // such an AUTH, or the MAIL behind it, has failed; false: that was not why
	SessionFull(n int, born time.Time, r wire.Reply)                      // the relay has ended a connection opened at born after n transactions, with r
	SessionGoesOn(n int)                                                  // the relay has accepted the nth MAIL of a connection
	DiscardsAt(addr string) (yes, known bool)                             // the relay at addr throws away the octets of a chunk that it refuses
	NoteDiscard(addr string, yes bool)                                    // it has shown whether it does
	RefusalOf(mark [sha256.Size]byte) (wire.Reply, bool)                  // the reply to these credentials, if they were refused not long ago
	AuthAnswered(mark [sha256.Size]byte, reply wire.Reply, followed bool) // the last reply to AUTH, and whether commands followed that
	AuthGivenUp()                                                         // the relay has refused an AUTH that was given up
	Overlapped()                                                          // a transaction was begun behind a final dot
	EndsSession(op Step, r wire.Reply, seq int, worked bool) bool         // the reply to the seqth transaction is about the connection: another one may have the message. worked: an earlier one came to something
	ResetsByEHLO() bool                                                   // the relay does not know RSET
	RsetFailed()                                                          // it has said so
}

// Owner hands out the write side of one Conn, which one transaction has at a time.
type Owner interface {
	Greeted()      // the relay has greeted, and may be asked more
	Wanted() bool  // somebody waits for a write side
	Handoff() bool // gives it to one who waits and can go on at once, if there is one
	Release()      // takes it back; what is still in the buffer leaves soon

	// SendAway starts a goroutine that calls Conn.SendAway; it reports false where the connection is gone.
	SendAway() bool

	Elsewhere() bool // a transaction may be begun at once on another Conn

	// Changed is told when a final reply is in, which answered says, and when the connection can be used no more; Closed when
	// the relay has closed it, which is the last thing that happens. No lock is held.
	Changed(answered bool)
	Closed()
}

// Trace is told what is said. Either may be nil.
type Trace struct {
	Command func(ctx context.Context, line string)
	Reply   func(ctx context.Context, to Step, r wire.Reply)
}
