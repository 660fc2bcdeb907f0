// Package smtprelay sends mail through a relay such as SendGrid, Amazon SES or a Postfix on the local network.
//
//   - A [Client] is a pool of authenticated connections to one relay. Make one with [New] when the program starts, share it between all
//     goroutines, and end it with [Client.Shutdown].
//   - A [Message] is an envelope (From, To) and a Body, the finished text of the mail (RFC 5322). This package does not make mails: write
//     the text yourself, or let a library such as wneessen/go-mail do it.
//   - [Client.Send] blocks until the relay has accepted or refused the message. Each Send has one of three outcomes, an [Outcome]:
//     accepted, not accepted, or unknown.
//   - The error of a Send is an [*Error]. [ShouldRetry] tells whether to keep the message, [RetryTo] for which recipients.
//
// In a program:
//
//	client, err := smtprelay.New(smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")})
//	if err != nil { … }
//	defer client.Close()
//	receipt, err := client.Send(ctx, smtprelay.Message{
//		From: "shop@example.com",
//		To:   []string{"ann@example.org"},
//		Body: smtprelay.Bytes(rfc5322),
//	})
//
// The Client never opens more connections than the relay allows, and never sends more messages on a connection than the relay
// allows: 10 connections and 100 messages on each, unless [Limits] says otherwise. On a busy connection it writes the next
// message before the reply to the previous message has arrived (RFC 2920), so that a message costs one round trip.
//
// docs/wishes.md in the repository has the code for what services want beyond that: HTML and attachments, many messages, a queue,
// metrics, tenants, DKIM and the rest.
//
// # Security
//
// Mail and credentials cross only a TLS connection whose certificate was verified for the host of Config.Addr. There is no silent
// fallback to clear text. Mail goes without TLS only to a loopback address, or where [TLSNone] or [TLSOpportunistic] is set;
// credentials go without TLS only to a loopback address, whatever the mode, or where Config.AllowInsecureAuth is set. The password
// appears in no error, log line or dump. Package smtp, a replacement for net/smtp, is as opportunistic about TLS as net/smtp is.
//
// # Outcomes
//
// A nil error means that the relay has accepted the message for every recipient. Otherwise Error.Outcome says which of these is true:
//
//   - [Accepted]: the relay has accepted the message for some recipients. Error.Recipients names the others.
//   - [NotAccepted]: the relay has not accepted it for any recipient. Sending it again delivers nothing twice.
//   - [Unknown]: the connection was lost between the end of the message and the relay's reply. The relay may or may not have accepted
//     it; sending it again may deliver it twice.
//
// The Client itself retries only if nothing can have been accepted. [Retry] says how often.
//
// A queue calls [ShouldRetry] to decide whether to keep a message, or [RetryTo] to learn for which recipients. RetryTo never
// returns a recipient for whom the message was or may have been accepted, or who was refused permanently. Error.Scope says what
// was at fault and Error.Op at which step.
//
// # Standards
//
// RFC 5321 (SMTP), 2920 (PIPELINING), 3030 (CHUNKING), 3207 (STARTTLS), 8314 (implicit TLS), 4954 (AUTH), 4616 (PLAIN),
// 1870 (SIZE), 6152 (8BITMIME), 6531 (SMTPUTF8), 3461 (DSN), 2034 and 3463 (enhanced status codes), 8689 (REQUIRETLS),
// 9422 (LIMITS), 2852 (DELIVERBY), 6710 (MT-PRIORITY), 7293 (RRVS).
package smtprelay
