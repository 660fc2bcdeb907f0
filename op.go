package smtprelay

import (
	"strings"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// Op is the step in which an [Error] happened, or to which a command or reply belongs. It is a short lower-case word that does not
// change between versions, for use as the label of a metric; [Op.Text] is for people. The same failure has the same Op with and
// without CHUNKING.
type Op string

const (
	OpConfig   Op = "config"   // a Config or a URL was checked
	OpCheck    Op = "check"    // the message was checked, alone or against what the relay offers
	OpWait     Op = "wait"     // for a connection
	OpDial     Op = "dial"     // the network connection was opened
	OpGreeting Op = "greeting" // the relay's first reply
	OpEHLO     Op = "ehlo"     // EHLO, or HELO
	OpSTARTTLS Op = "starttls" // STARTTLS
	OpTLS      Op = "tls"      // the TLS handshake
	OpAuth     Op = "auth"     // AUTH, and each of its rounds
	OpRset     Op = "rset"     // RSET
	OpMail     Op = "mail"     // MAIL
	OpRcpt     Op = "rcpt"     // RCPT
	OpData     Op = "data"     // DATA, or BDAT for a chunk that is not the last
	OpBody     Op = "body"     // the body was written
	OpEnd      Op = "end"      // the final dot, or the last chunk: its reply decides
	OpQuit     Op = "quit"     // QUIT
)

var opTexts = map[Op]string{
	OpConfig:   "configuration",
	OpCheck:    "checking the message",
	OpWait:     "waiting for a connection",
	OpDial:     "dial",
	OpGreeting: "greeting",
	OpEHLO:     "EHLO",
	OpSTARTTLS: "STARTTLS",
	OpTLS:      "TLS handshake",
	OpAuth:     "AUTH",
	OpRset:     "RSET",
	OpMail:     "MAIL FROM",
	OpRcpt:     "RCPT TO",
	OpData:     "DATA",
	OpBody:     "sending the body",
	OpEnd:      "end of the message",
	OpQuit:     "QUIT",
}

// Text returns the step in words, as in the text of an [Error].
func (op Op) Text() string {
	if text, ok := opTexts[op]; ok {
		return text
	}
	return string(op)
}

// opOf is the Op of a step of a connection.
func opOf(step conn.Step) Op {
	switch step {
	case conn.StepDial:
		return OpDial
	case conn.StepGreeting:
		return OpGreeting
	case conn.StepEHLO:
		return OpEHLO
	case conn.StepSTARTTLS:
		return OpSTARTTLS
	case conn.StepTLS:
		return OpTLS
	case conn.StepAuth:
		return OpAuth
	case conn.StepRset:
		return OpRset
	case conn.StepMail:
		return OpMail
	case conn.StepRcpt:
		return OpRcpt
	case conn.StepData, conn.StepBdat:
		return OpData
	case conn.StepBody:
		return OpBody
	case conn.StepFinalDot:
		return OpEnd
	case conn.StepQuit:
		return OpQuit
	}
	return Op(step)
}

// opOfCommand is the Op of a command as a connection traces it.
func opOfCommand(line string) Op {
	switch verb, _, _ := strings.Cut(line, " "); verb {
	case "EHLO", "HELO":
		return OpEHLO
	case "STARTTLS":
		return OpSTARTTLS
	case "AUTH", redacted, "*":
		return OpAuth
	case "RSET":
		return OpRset
	case "MAIL":
		return OpMail
	case "RCPT":
		return OpRcpt
	case "BDAT":
		if strings.HasSuffix(line, " LAST") {
			return OpEnd
		}
		return OpData
	case "DATA":
		return OpData
	case ".":
		return OpEnd
	}
	return OpQuit
}
