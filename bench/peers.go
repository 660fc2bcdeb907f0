// The peers, in the order of the tables.

package main

var peers = []*peer{
	{name: "smtprelay", kind: ours, what: "Send; all settings at their defaults, but Chunking where the relay offers CHUNKING", run: runSmtprelay},
	{name: "smtprelay deep", kind: ours, deep: true, what: "Send with Chunking and MaxInFlight 32, from 640 senders", run: runSmtprelayDeep},

	{name: "raw DATA", kind: limit, what: "octets only: the next envelope in one write with the final dot", run: runRawData},
	{name: "raw CHUNKING", kind: limit, what: "octets only: envelope, BDAT with the message and BDAT 0 LAST in one write, 4 in flight", run: runRawChunking},
	{name: "raw CHUNKING deep", kind: limit, deep: true, what: "the same with 32 in flight, from 640 senders", run: runRawChunking},

	{name: "two round trips", kind: byHand, what: "octets only: the envelope in one write, then the body; kept connections", run: runTwoRoundTrips},
	{name: "mox", what: "smtpclient.Deliver, kept connections", run: runMox},
	{name: "nodemailer", what: "its pool: maxConnections 10, maxMessages 100", run: nil},
	{name: "net/smtp kept", what: "Mail, Rcpt, Data, kept connections", run: runNetSMTP},
	{name: "go-smtp kept", what: "Client.SendMail, kept connections", run: runGoSMTP},
	{name: "go-mail kept", what: "SendWithSMTPClient, WithoutNoop, kept connections", run: runGoMail},
	{name: "gomail kept", what: "SendCloser, kept connections", run: runGomail},
	{name: "smtppool", what: "its pool of 10, which cannot rotate; sent again by hand after 421", run: runSMTPPool},
	{name: "email.Pool", what: "its pool of 10, which cannot rotate; sent again by hand after 421", run: runEmailPool},
	{name: "net/smtp SendMail", each: true, what: "a connection for each message, 10 at a time", run: runSendMail},
	{name: "go-smtp SendMail", each: true, what: "a connection for each message, 10 at a time", run: runGoSMTPEach},
	{name: "go-mail DialAndSend", each: true, what: "a connection for each message, 10 at a time", run: runGoMailEach},
}

func peerNamed(name string) *peer {
	for _, p := range peers {
		if p.name == name {
			return p
		}
	}
	return nil
}
