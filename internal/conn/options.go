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

// Options are common to all connections to one relay. They must not change after the first Open.
type Options struct {
	Timeouts  Timeouts
	LocalName func(net.Conn) string // the argument of EHLO

	Pipelining  bool // commands may be written before the previous command has its reply
	Overlap     bool // commands may be written after an unanswered final dot
	Chunking    bool // bodies may be sent in chunks
	MaxInFlight int  // maximum number of messages without final reply, with chunks

	TLS      *tls.Config // nil: no TLS
	Implicit bool        // TLS begins with the first byte, not with STARTTLS

	// Clear says what may be sent without TLS: mail, if the relay does not offer STARTTLS, and credentials.
	Clear func(net.Conn) (mail, credentials bool)

	// Mechanism returns the SASL mechanism; nil: no AUTH, and HELO is enough. Open returns an *OpenError of Mechanism unchanged.
	Mechanism func(ctx context.Context, ext *wire.Extensions, state *tls.ConnectionState) (sasl.Client, error)
	// OtherMechanism, if not nil, returns the mechanism to try if the relay offers a mechanism but replies 502 or 504 to it;
	// nil: none.
	OtherMechanism func(refused string, ext *wire.Extensions) sasl.Client
	Secrets        func() (username, password string) // credentials that Mechanism may send, to be removed from replies
	Said           *scrub.Known                       // credentials that connections have sent

	Profile  Profile
	Progress func(Step) // called with each step of Open that waits for the relay

	transactions sync.Pool // *Transaction; a field because a channel must not be shared between testing/synctest bubbles
}

// Timeouts bound the steps of a connection; 0 means no limit. Quit has a limit in any case.
type Timeouts struct {
	Greeting   time.Duration // the greeting, and each later reply until the connection is ready, unless Command is less
	TLS        time.Duration // the TLS handshake
	Command    time.Duration // the reply to a command; for AUTH, all rounds together
	First      time.Duration // the reply to the first MAIL, unless Command is less
	Data       time.Duration // the reply to DATA
	Write      time.Duration // a write while the relay reads nothing; see progressConn
	Unacked    time.Duration // the TCP acknowledgement of sent data
	FinalReply time.Duration // the reply to the final dot
	Drain      time.Duration // the reply to the final dot, once the message's context has ended
	Overlap    time.Duration // the first reply to commands after a final dot, counted from the reply to the dot
	Quit       time.Duration // the relay's close: half of it after QUIT, the rest after FIN
}

// openingLimit returns the limit for each reply until the connection is ready.
func (o *Options) openingLimit() time.Duration {
	limit := o.Timeouts.Command
	if g := o.Timeouts.Greeting; g > 0 && (limit == 0 || g < limit) {
		limit = g
	}
	return limit
}

// untilFIN returns the part of Quit to wait for the relay's close after QUIT. The rest is for the time after FIN: a relay that
// ignores QUIT closes then, and counts the connection until it does.
func (t Timeouts) untilFIN() time.Duration { return (t.Quit + 1) / 2 } // not 0, which would be no limit

// Profile stores what connections have learned about the relay. It is safe for concurrent use. Its methods, except AuthTurn, do not
// block, and take no lock that is held while a Conn is called.
type Profile interface {
	Overlaps() bool                                                       // commands may follow a final dot
	OverlapFailed()                                                       // the relay refused or discarded commands after a final dot
	AuthTurn(ctx context.Context) (done func(), ok bool)                  // waits for the turn to authenticate; false: waited too long
	AuthMayBeFollowed() bool                                              // commands may follow AUTH in one write
	AuthFollowedFailed(r wire.Reply) (so bool)                            // an AUTH with commands after it, or the MAIL after AUTH, failed with r; false: for another reason
	SessionFull(n int, born time.Time, r wire.Reply)                      // the relay ended a connection opened at born after n transactions, with r
	SessionGoesOn(n int)                                                  // the relay accepted the nth MAIL of a connection
	DiscardsAt(addr string) (yes, known bool)                             // whether the relay at addr discards the octets of a chunk that it refuses
	NoteDiscard(addr string, yes bool)                                    // records the answer for DiscardsAt
	RefusalOf(mark [sha256.Size]byte) (wire.Reply, bool)                  // the reply to these credentials, if they were refused recently
	AuthAnswered(mark [sha256.Size]byte, reply wire.Reply, followed bool) // the last reply to AUTH, and whether commands followed AUTH
	AuthGivenUp()                                                         // an AUTH ended without a verdict on the credentials
	Overlapped()                                                          // a transaction began after a final dot
	EndsSession(op Step, r wire.Reply, seq int, worked bool) bool         // r, a reply to the seqth transaction, is about the connection, so another connection may take the message; worked is Result.Worked
	ResetsByEHLO() bool                                                   // the relay does not know RSET
	RsetFailed()                                                          // the relay replied that it does not know RSET
}

// Owner lends the write side of one Conn to one transaction at a time.
type Owner interface {
	Greeted()      // the relay has sent its greeting
	Wanted() bool  // a message waits for a write side
	Handoff() bool // gives the write side to a waiting message that can start at once; false: there is none
	Release()      // takes the write side back and flushes the buffer soon

	// SendAway starts a goroutine that calls Conn.SendAway. It returns false if the connection is gone.
	SendAway() bool

	Elsewhere() bool // a transaction can begin at once on another Conn

	// Changed is called when a final reply has arrived (answered is true), and when the connection can no longer be used. Closed is
	// called last, when the relay has closed the connection. Neither is called with a lock held.
	Changed(answered bool)
	Closed()
}

// Trace receives commands and replies. Either func may be nil.
type Trace struct {
	Command func(ctx context.Context, line string)
	Reply   func(ctx context.Context, to Step, r wire.Reply)
}
